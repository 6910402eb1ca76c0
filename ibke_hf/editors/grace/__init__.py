"""The GRACE baseline: a codebook of keys, values and radii beside one layer, each edit an entry of it.

Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS. With x a
layer's input at a token (the query), K the keys and ε the radii of the codebook, the layer's output there becomes

    y = V_i  if d(x, K_i) < ε_i, i = argmin_j d(x, K_j), d the Euclidean distance;  y = layer(x)  otherwise: deferral.

Who looks up: every token, for itself, and only its own output is replaced. The key of a request is the query of its
last prompt token, the one token that the paper replaces for autoregressive models. A token's query depends on the
tokens before it alone, so that token is found wherever the text goes on: teacher-forced, prefilled, or held in a KV
cache; no step needs to know where the prompt ended. The layers above attend to the replaced output, which is how one
value spells several tokens.
"""

from .codebook import Codebooks, GRACEEdit
from .editor import GRACEConfig, GRACEEditor

__all__ = ["Codebooks", "GRACEConfig", "GRACEEdit", "GRACEEditor"]
