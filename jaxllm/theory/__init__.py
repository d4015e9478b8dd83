"""predict: the closed form. What the papers' formulas say that each device holds, computes and sends in a step.

Every formula takes integers or NumPy arrays of layouts, and never branches on a value: one call predicts one layout
or thousands. Nothing here knows what a compiler did.
"""

from jaxllm.theory.predict import PLAIN_AUTODIFF, predict

__all__ = ["PLAIN_AUTODIFF", "predict"]
