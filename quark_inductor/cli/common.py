"""What several commands share: arguments, where documents go, errors of the command line."""

import argparse
import ast
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quark_inductor.schemes.errors import QuarkInductorError

STANDARD_OUTPUT = "-"


class UsageError(QuarkInductorError):
    """A wrong command line, found out once it is known what there is: exit code 2."""


class Document:
    """Where a document goes: into a file, or to standard output, where nothing else goes then.

    Attributes:
        path: of the file; ``None``: standard output.
    """

    def __init__(self, text: str) -> None:
        self.path = None if text == STANDARD_OUTPUT else Path(text)
        self._stream = sys.stdout  # before it is redirected

    def check(self) -> None:
        """Refuse a file that cannot be written, before the work is done.

        Raises:
            QuarkInductorError: says why.
        """
        if self.path is not None:
            check_writable(self.path)

    def write(self, text: str) -> None:
        """Write it.

        Raises:
            QuarkInductorError: it cannot be written.
        """
        text = text.rstrip("\n") + "\n"
        if self.path is None:
            self._stream.write(text)
            self._stream.flush()
            return
        try:
            self.path.write_text(text, encoding="utf-8")
        except OSError as e:
            raise QuarkInductorError(f"cannot write {self.path}: {e.strerror}") from e

    @contextlib.contextmanager
    def as_path(self) -> Iterator[Path]:
        """A file for what writes one itself; it goes where it shall go at the end."""
        if self.path is not None:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="quark-inductor-") as folder:
            path = Path(folder, "document")
            yield path
            if path.exists():
                self.write(path.read_text(encoding="utf-8"))


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be written.

    Raises:
        QuarkInductorError: says why.
    """
    if path.is_dir():
        raise QuarkInductorError(f"cannot write {path}: it is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise QuarkInductorError(
            f"cannot write {path}: there is no folder {path.parent}; make it, or name another file"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise QuarkInductorError(f"cannot write {path}: no permission; name another file")


def documents(arguments: argparse.Namespace) -> list[Document]:
    """All that a command line says where to write."""
    return [value for value in vars(arguments).values() if isinstance(value, Document)]


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """``--json FILE``."""
    parser.add_argument(
        "--json", type=Document, metavar="FILE", help=f"write {what} there; -: to standard output, and nothing else"
    )


def add_document(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """``--html FILE`` and the like."""
    parser.add_argument(name, type=Document, metavar="FILE", help=what)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``CKPT`` and ``--device``."""
    add_path(parser)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where it runs, such as cuda; default: cpu")


def add_path(parser: argparse.ArgumentParser) -> None:
    """``CKPT``."""
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a folder with a Quark checkpoint, or a model's id on the Hugging Face hub"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--option KEY=VALUE``."""
    parser.add_argument(
        "--option",
        action="append",
        type=_option,
        default=[],
        metavar="KEY=VALUE",
        help="an option of torch.compile(backend='quark'), such as quark.provider=triton (may be repeated)",
    )


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no option; expected KEY=VALUE, such as quark.strict=True")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def positive(text: str) -> int:
    """A number of one and more.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def check_known(what: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    """Refuse a name that is none of those that there are.

    Raises:
        UsageError: names the known ones.
    """
    if unknown := [name for name in given or () if name not in known]:
        raise UsageError(f"there is no {what} {unknown[0]!r}; expected one of {', '.join(known)}")


def load(arguments: argparse.Namespace) -> Any:
    """The model of ``CKPT`` on ``--device``.

    Raises:
        QuarkInductorError: as :func:`quark_inductor.load`, or there is no such device.
    """
    import torch

    from quark_inductor.loading import load as load_checkpoint

    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as e:
        first = str(e).splitlines()[0]
        raise QuarkInductorError(f"torch cannot use the device {arguments.device!r}: {first}") from e
    return load_checkpoint(arguments.checkpoint, device=arguments.device)


def random_tokens(model: Any, count: int) -> Any:
    """``[1, count]`` tokens of a model, the same each time."""
    import torch

    size = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, size, (1, count), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.device)


def options_of(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Those of :func:`add_options`."""
    return dict(arguments.option)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse an option that ``torch.compile(backend="quark")`` would refuse, before a model is loaded.

    Raises:
        OptionError: an unknown one, or a value of the wrong type.
    """
    if options:
        from quark_inductor.backend import split_options
        from quark_inductor.lowering import providers  # noqa: F401

        split_options(None, options)
