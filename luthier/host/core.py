"""An attention core, met where the module calls torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import DoesNotFit
from ..tokens import Attention


class Intercept(TorchFunctionMode):
    """Hands every scaled_dot_product_attention inside to the attend entries first."""

    def __init__(self, entries, host):
        super().__init__()
        self.entries, self.host, self.calls = entries, host, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        H, K, _ = self.entries[0].site.heads or (0, 0, 0)
        if query.shape[1] == K != H and query.shape[2] == H // K:     # transformers folds the groups of a single query to tokens
            return self._attend(query.reshape(len(query), H, 1, -1), key, value, attn_mask, dropout_p, is_causal, scale,
                                True).reshape(query.shape)
        stack = self.host.run(self.entries[0].site.stack)
        t = stack.tokens if stack is not None else None
        if stack is not None and t is None:                 # no stream was touched before this block: the stream starts here
            t = stack.take(query.new_empty(len(query), query.shape[-2], 0))
        if t is not None and attn_mask is not None and attn_mask.shape[-1] not in (1, key.shape[-2]):
            attn_mask = self._recut(t, attn_mask, key)
        a = Attention(query, key, value, t, attn_mask, is_causal, scale, dropout_p, enable_gqa)
        for e in self.entries:
            a = e.act("attend", a=a)
            if isinstance(a, torch.Tensor):
                return a
        if stack is not None:
            stack.tokens = a.t
        return a.run()

    def _recut(self, t, mask, key):
        """The model's mask was made before tokens merged: padding is read from the lane that moved with them."""
        if mask.shape[1] != 1 or t.causal or key.shape[-2] != t.h.shape[1]:
            raise DoesNotFit(f"{self.entries[0].site.name} adds a bias per pair of positions ({tuple(mask.shape)}), which no "
                             f"longer fits {key.shape[-2]} merged tokens. Use the method on a model without such biases.")
        return None if t.mask is None else t.mask[:, None, None, :]
