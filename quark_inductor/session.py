"""A model that is asked and answers token by token, with a static KV cache."""

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quark_inductor.loading import folder_of
from quark_inductor.schemes.errors import CheckpointError


class Session:
    """One model and one question.

    The question goes through the model at once, what follows token by token.
    """

    def __init__(self, tokenizer: Any, model: Any, question: str, most: int) -> None:
        """Prepare a question.

        Args:
            tokenizer: the model's. With a chat template the question is a user's turn, else it is continued.
            model: a transformers model with a head for tokens.
            question: in words.
            most: tokens that may follow it.
        """
        from transformers import StaticCache

        self.tokenizer, self.model = tokenizer, model
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": question}]
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(question, return_tensors="pt")
        self.prompt: torch.Tensor = encoded["input_ids"].to(model.device)
        config, length = model.config.get_text_config(), self.prompt.shape[1] + most + 1
        self.cache = StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)

    def generate(self, ids: torch.Tensor, most: int, least: int = 1, streamer: Any = None) -> torch.Tensor:
        """The tokens that follow ``ids [1, T]``, greedily."""
        self.cache.reset()
        out: torch.Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            do_sample=False,
            min_new_tokens=least,
            max_new_tokens=most,
            streamer=streamer,
            disable_compile=True,  # forward is compiled already, by us
        )
        return out[0, ids.shape[1] :]

    def decode(self, tokens: torch.Tensor) -> str:
        """Tokens as text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def tokens_per_second(self, tokens: int) -> float:
        """Speed of a single token."""
        clock = Clock()
        self.generate(self.prompt, tokens + 1, least=tokens + 1, streamer=clock)
        speed = clock.tokens_per_second()
        assert speed is not None
        return speed

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile all but the question at once, which stays eager: it comes once."""
        eager = self.model.forward
        compiled = torch.compile(eager, backend="quark", fullgraph=True, dynamic=False, options=dict(options))

        @functools.wraps(eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            question = kwargs.get("past_key_values") is not None and kwargs["input_ids"].shape[1] > 1
            return (eager if question else compiled)(*args, **kwargs)

        self.model.forward = forward


class Clock:
    """A streamer that only notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last."""

    def tokens_per_second(self) -> float | None:
        """One over the median time between two tokens; ``None``: there were none."""
        # The first two times are those of the prompt and of the token that its forward pass gave.
        between = [b - a for a, b in itertools.pairwise(self.times[1:])]
        return 1.0 / statistics.median(between) if between else None


class Stream:
    """A streamer that writes text as it comes, and tells a clock."""

    def __init__(self, tokenizer: Any, file: Any, clock: Clock) -> None:
        self.tokenizer, self.file, self.clock = tokenizer, file, clock
        self._tokens: list[int] = []
        self._written: str | None = None

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.clock.put(tokens)
        if self._written is None:
            self._written = ""
            return
        self._tokens += tokens.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True).lstrip()
        if not text.endswith("\ufffd"):  # the rest of a character is in the next token
            self._write(text)

    def _write(self, text: str) -> None:
        assert self._written is not None
        self.file.write(text[len(self._written) :])
        self.file.flush()
        self._written = text

    def end(self) -> None:
        """Called after the last."""
        self.file.write("\n")
        self.file.flush()


def tokenizer_of(path: str | Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        CheckpointError: it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    folder = folder_of(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(names)}): copy the files of the model that was quantized "
            "there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # what a wrong file makes transformers raise has no common class
        first = (str(e).strip().splitlines() or [""])[0]
        raise CheckpointError(f"transformers cannot read the tokenizer in {folder}: {type(e).__name__}: {first}") from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers says nothing but errors: commands say what they do."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
