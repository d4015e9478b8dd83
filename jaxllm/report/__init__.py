"""What both authors say, side by side: comparison, tables, JSON, plots. No JAX, and no NumPy at import."""

from jaxllm.report.compare import Comparison, Peak, Row, RunResult, Setup, exit_code

__all__ = ["Comparison", "Peak", "Row", "RunResult", "Setup", "exit_code"]
