"""The LEMoE baseline: a mixture of experts beside one FFN, of which each batch of edits inserts one.

Wang & Li 2024, "LEMoE: Advanced Mixture of Experts Adaptor for Lifelong Model Editing of Large Language Models",
EMNLP.

Beside one FFN lies a mixture of small FFNs. Each batch of edits inserts an expert of its own and freezes those before
it (module insertion); an expert is found by its keys, which the batch leaves behind as anchors (KV anchor routing);
and the requests of one call are clustered, so that an expert gets like ones (order planning).

Where the paper leaves room, or promises less, this is ours: a key is the value that a request was trained on, not a
learned vector, so that routing in use is routing in training by construction; an input that is near to no key is
routed nowhere and stays as it is, bit for bit; experts read values of unit length and start at zero, which makes the
learning rate a property of no model.
"""

from .editor import LEMoEConfig, LEMoEEditor
from .mixture import LEMoEEdit, unit
from .planning import anchors, clustered

__all__ = ["LEMoEConfig", "LEMoEEdit", "LEMoEEditor", "anchors", "clustered", "unit"]
