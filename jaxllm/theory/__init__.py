"""predict: the closed form. What the papers' formulas say that each device holds, computes and sends in a step.

Every formula takes integers or NumPy arrays of layouts, and never branches on a value: one call predicts one layout
or thousands. Nothing here knows what a compiler did.
"""

from jaxllm.theory.predict import PLAIN_AUTODIFF, predict
from jaxllm.theory.training import flops_per_token, training_days

__all__ = ["PLAIN_AUTODIFF", "flops_per_token", "predict", "training_days"]
