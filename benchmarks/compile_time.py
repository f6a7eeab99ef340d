"""What compiling a model costs, where that time goes, and what it costs to look.

    python benchmarks/compile_time.py [SCHEME]

SmolLM2-135M, 30 blocks, 16 tokens: quantized and compiled by this backend, in bfloat16 and compiled by Inductor alone,
each in a process of its own, cold and warm (``profile_compile``). Then what events and recording cost:

- off: events of ours in that compilation, by the time that one takes where nobody records, over its time;
- on: time in the recorder's code over the time on the clock; and compilations with and without a recorder, in turns.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCHEME, TOKENS, TURNS, EVENTS = "mxfp4", 16, 3, 20_000


def model(scheme: str) -> Any:
    """The model, in bfloat16 or quantized."""
    import quark_inductor as qi
    from quark_inductor import demo
    from quark_inductor.machine import cache_folder

    _, loaded = demo.load_float(demo.fetch_model(cache_folder()))
    return loaded if scheme == "bf16" else qi.quantize_(loaded, scheme)


def profile(scheme: str) -> str:
    """A profile as JSON, with the figures of what recording it took."""
    import torch

    import quark_inductor as qi
    from quark_inductor.recorder import Recorder

    spent, tell = [0.0], Recorder._tell

    def timed(self: Recorder, event: Any) -> None:
        start = time.perf_counter()
        tell(self, event)
        spent[0] += time.perf_counter() - start

    Recorder._tell = timed  # type: ignore[method-assign]
    found = qi.profile_compile(
        model(scheme),
        input_ids=torch.arange(TOKENS)[None],
        use_cache=False,
        dynamic=False,
        backend="inductor" if scheme == "bf16" else "quark",
    )
    return json.dumps({"profile": found.to_json(), "recorder_s": spent[0]})


def turns(scheme: str) -> str:
    """Seconds of cold compilations, with and without a recorder in turns, and of an event that nobody records."""
    import contextlib

    import torch

    from quark_inductor.patterns._inductor import clear_caches, dynamo_timed, fresh_cache
    from quark_inductor.recorder import Recorder

    loaded, ids = model(scheme), torch.arange(TOKENS)[None]
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(1 + 2 * TURNS):
        name = "with" if turn % 2 else "without"
        with fresh_cache(), Recorder() if name == "with" else contextlib.nullcontext(), torch.no_grad():
            torch._dynamo.reset()
            clear_caches()
            start = time.perf_counter()
            torch.compile(loaded, backend="quark", dynamic=False)(input_ids=ids, use_cache=False)
            if turn:  # the first one imports and looks at the compiler
                seconds[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(EVENTS):
        with dynamo_timed("quark.benchmark"):
            pass
    return json.dumps({**seconds, "event_s": (time.perf_counter() - start) / EVENTS})


def main() -> None:
    """Print tables, or in a process of its own a part of them."""
    scheme = sys.argv[1] if len(sys.argv) > 1 else SCHEME
    if len(sys.argv) > 2:
        print({"profile": profile, "turns": turns}[sys.argv[2]](scheme))
        return

    def of(part: str, scheme: str) -> Any:
        command = [sys.executable, str(Path(__file__).resolve()), scheme, part]
        return json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )

    from quark_inductor.profile import Profile

    ours, stock = of("profile", scheme), of("profile", "bf16")
    mine, theirs = (Profile.from_json(part["profile"]) for part in (ours, stock))
    print(f"torch {mine.versions['torch']}, {mine.cpu}; {scheme}, then bfloat16 by Inductor alone\n")
    print(f"{mine}\n\n{theirs}\n\n{mine.compare(theirs)}\n")
    ratio = mine.cold.wall_s / theirs.cold.wall_s
    print(f"cold: {ratio:.2f} times Inductor alone; warm: {mine.warm.wall_s / theirs.warm.wall_s:.2f} times")
    print(f"passes of ours: {mine.cold.phases['quark_passes'] / mine.cold.wall_s:.2%} of the cold run")
    measured = of("turns", scheme)
    events = sum(n.count for top in mine.cold.tree for n in top.walk() if n.name.startswith("quark."))
    without, recorded = (statistics.median(measured[name]) for name in ("without", "with"))
    off = events * measured["event_s"]
    print(f"off: {events} events of {measured['event_s'] * 1e6:.0f} us in {without:.1f} s: {off / without:.4%}")
    print(f"on: {ours['recorder_s'] * 1e3:.0f} ms in the recorder, both runs: ", end="")
    print(f"{ours['recorder_s'] / (mine.cold.wall_s + mine.warm.wall_s):.3%}")
    ranges = ", ".join(f"{min(s):.1f} to {max(s):.1f} s" for s in (measured["with"], measured["without"]))
    print(f"on, in {TURNS} turns: {recorded:.1f} s with, {without:.1f} s without ({ranges})", end="")
    print(f": {recorded / without - 1:+.1%}")


if __name__ == "__main__":
    main()
