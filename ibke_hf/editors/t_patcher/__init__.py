"""The T-Patcher baseline: one trained neuron in the last FFN for each token that the model gets wrong.

Huang et al. 2023, "Transformer-Patcher: One Mistake worth One Neuron", ICLR. With q the input of the last FFN at a
token, patches (k_p, b_p, v_p) change its output to

    FFN_p(q) = FFN(q) + Σ_p Act(q·k_p + b_p) v_p

and are trained at the query q_e of the mistake, among memory queries M of text that they must stay silent on, by

    l = l_e + a l_a + m (l_m1 + l_m2)          l_e: cross-entropy of the target
    l_a  = exp(-q_e·k_p - b_p)                 the patch fires on the mistake
    l_m1 = S(M k_p + b_p - β)                  it is silent on the memory: below β
    l_m2 = S((M - q_e) k_p - γ)                and far below the mistake's own activation: by γ
    S(v) = mean of the k largest exp(v).

A patch of a ReLU that is silent adds an exact zero, so a token that no patch fires on is predicted bit-identically.
"""

from .editor import TPatcherConfig, TPatcherEditor
from .patches import TPatcherEdit, patched_ffn
from .queries import sampled_texts

__all__ = ["TPatcherConfig", "TPatcherEdit", "TPatcherEditor", "patched_ffn", "sampled_texts"]
