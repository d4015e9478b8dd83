"""The floors of the house: folders import only from those below, and the two authors never see each other."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_import_contracts():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "4 kept, 0 broken" in done.stdout


def test_the_closed_form_runs_without_jax():
    code = """
import sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["optax"] = None  # importing them raises ImportError
import jaxllm, jaxllm.report.document, jaxllm.report.explain, jaxllm.report.plot, jaxllm.report.table
model, layout = jaxllm.ModelConfig.load("llama-2-7b"), jaxllm.Layout.parse("data=4,tensor=2,zero=3,remat=full")
assert jaxllm.predict(model, layout, jaxllm.Workload(8, 4096, "bf16-f32")).total("memory") > 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
