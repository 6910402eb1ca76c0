"""The SERAC baseline: a memory of requests beside the model.

Mitchell et al. 2022, "Memory-Based Model Editing at Scale", ICML.

A scope classifier g compares what the model is asked with every request in the memory; in scope of the best one, a
small counterfactual model h that reads this request before the prompt answers in place of the model; out of scope, the
model's own answer stands, bit for bit. g and h are trained once, on edit records, without the model:
:class:`ibke_hf.training.serac.SERACTrainer`. Editing is nothing but writing requests into the memory.

Where the paper leaves room this is ours: g and h are causal decoders on the backbone's own tokens, so that a decision
at a token never sees what comes after it; the embedding form scores by sigmoid(b - s·‖φ(z) - φ(x)‖²), which unlike
exp(-‖·‖²) can be trained from any start.
"""

from .config import SERACConfig
from .editor import ScopesAndAnswers, SERACEditor
from .memory import Entry, SERACEdit, memory_of

__all__ = ["Entry", "SERACConfig", "SERACEdit", "SERACEditor", "ScopesAndAnswers", "memory_of"]
