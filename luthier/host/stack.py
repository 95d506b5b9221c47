"""One run of blocks: its Tokens from the first port to the last, and the cache it writes into."""

import functools
from dataclasses import replace

import torch

from ..errors import DoesNotFit
from ..method import call
from ..tokens import Tokens, rows_together


class _Remembering:
    """A KV cache whose rows and tokens move together with what side networks remember beside it (beams, candidates, drafts)."""

    def _move(self, how):
        for key, tensors in self._luthier_memory.items():
            self._luthier_memory[key] = tuple(map(how, tensors))

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._move(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._move(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._move(lambda t: t[indices])

    def crop(self, tokens):
        super().crop(tokens)
        self._move(lambda t: t[:, :, :self.get_seq_length()])


@functools.cache
def _with_memory(cls):
    return type(cls.__name__, (_Remembering, cls), {})


def remembering(past):
    """The memory of a KV cache: name -> (k, v), each (B, H, S, Dh)."""
    if "_luthier_memory" not in past.__dict__:
        past._luthier_memory = {}
        if hasattr(past, "reorder_cache"):
            past.__class__ = _with_memory(type(past))
    return past._luthier_memory


class StackPort:
    """Around one run of blocks: starts its Tokens, keeps masks and positions right for inserted tokens, takes them out again."""

    def __init__(self, host, stack):
        self.host, self.stack, self.tokens, self.inserted, self.spans, self.frames = host, stack, None, None, {}, 1
        self.handles = [stack.module.register_forward_pre_hook(self.before, with_kwargs=True),
                        stack.module.register_forward_hook(self.after, with_kwargs=True)]
        if stack.embed == "out":                            # heads inside the stack must not see inserted tokens
            end = stack.final_module if stack.final_module is not None else stack.blocks[-1] if stack.blocks else None
            if end is not None:
                self.handles.append(end.register_forward_hook(self.leave))
        self.proto = self.again = None

    def remove(self):
        for h in self.handles:
            h.remove()
        self.tokens = self.proto = None

    def checkpointed(self):
        return any(getattr(b, "gradient_checkpointing", False) for b in self.stack.blocks)

    def embed_port(self):
        return self.host.ports.get((self.stack.embed_module, "out", self.stack.name))

    def length(self):
        """How many tokens the methods at the embedding insert; found once by running them on a dummy stream."""
        if self.inserted is None:
            port, s = self.embed_port(), self.stack
            self.inserted, self.spans = 0, {}
            if port is not None and port.live:
                like = next(s.module.parameters())
                t = Tokens(like.new_zeros(1, s.fixed + 8, port.site.d_out), fixed=s.fixed, causal=s.causal)
                with torch.no_grad():
                    for e in port.live:
                        t = call(e.method, "stream", t=t, p=e.p)
                self.inserted, self.spans = t.h.shape[1] - s.fixed - 8, t.spans
                if self.inserted and s.insert:
                    raise DoesNotFit(f"{type(port.live[0].method).__name__} inserts tokens at {port.site.name}, which cannot "
                                     f"hold them: {s.insert}. Use a method that changes weights or streams in place.")
        return self.inserted

    def _words(self, port, args, kwargs):
        """Texts before positions are added: looked up and changed here. Ids and mask go along as lanes, so the model itself adds
        the positions and finds the end of each text; what is inserted has the id 0. Padding gives way to what is inserted where
        the positions end, and takes the place of what goes where there is no mask (SigLIP reads a text at its last padding)."""
        s, port.ready, ids = self.stack, None, kwargs.pop("input_ids", None)
        if ids is None:
            ids, args = args[0], args[1:]
        mask, most = kwargs.get("attention_mask"), getattr(s.module.config, "max_position_embeddings", None) or 10**9
        lanes = {"ids": ids[..., None]} | ({} if mask is None else {"mask": mask.bool()[..., None]})
        t = Tokens(s.words_module(ids), lanes, fixed=1 if s.causal else s.fixed, causal=s.causal)
        for e in port.live:
            t = e.act("stream", t=t)
        if mask is None and (short := ids.shape[1] - t.h.shape[1]) > 0:
            pad = t.lanes["ids"][:, -1:].expand(-1, short, 1)
            t = replace(t, h=torch.cat([t.h, s.words_module(pad[..., 0])], 1), lanes={"ids": torch.cat([t.lanes["ids"], pad], 1)})
        ids = t.lanes["ids"][..., 0]
        if ids.shape[1] > most and not (ids[:, most - 1:] == ids[:, -1:]).all():
            raise DoesNotFit(f"{type(port.live[-1].method).__name__} makes texts of {ids.shape[1]} tokens at {port.site.name}, "
                             f"and the model has {most} positions. Insert fewer tokens, or give shorter texts.")
        port.ready, kwargs["input_ids"] = t.h[:, :most], ids[:, :most]
        if mask is not None:
            kwargs["attention_mask"] = t.lanes["mask"][:, :most, 0].to(mask.dtype)
        return args, kwargs

    def before(self, module, args, kwargs):
        s, n = self.stack, self.length()
        words = self.host.ports.get((s.words_module, "out", s.name)) if s.words_module is not None else None
        if words is not None and words.live:
            args, kwargs = self._words(words, args, kwargs)
        past = kwargs.get("past_key_values")
        seen = _length(past)
        cached = getattr(past, "_luthier_inserted", 0) if seen else 0
        if seen and cached != n:
            raise DoesNotFit(f"This KV cache holds {cached} inserted tokens, the chain inserts {n}. Start generation afresh "
                             "after attaching, detaching or switching.")
        mask = kwargs.get("attention_mask")
        if n:
            if mask is None and s.embed == "ids":
                pass                                        # the model makes its mask from the longer stream itself
            elif torch.is_tensor(mask) and mask.dim() == 2:
                at = 0 if seen else s.fixed
                kwargs["attention_mask"] = mask = torch.cat([mask[:, :at], mask.new_ones(len(mask), n), mask[:, at:]], 1)
            elif mask is not None:
                raise DoesNotFit(f"{s.name or 'the model'} was given an attention mask that is not (batch, tokens); "
                                 "with inserted tokens pass the padding mask itself.")
            if s.embed == "ids":
                for name in ("position_ids", "cache_position"):
                    pos = kwargs.get(name)
                    if torch.is_tensor(pos):
                        new = torch.arange(n, device=pos.device).expand(*pos.shape[:-1], n)
                        kwargs[name] = pos + n if seen else torch.cat([new.to(pos.dtype), pos + n], -1)
        if torch.is_tensor(kwargs.get("encoder_attention_mask")) and torch.is_tensor(kwargs.get("encoder_hidden_states")):
            em, states = kwargs["encoder_attention_mask"], kwargs["encoder_hidden_states"]
            if em.dim() == 2 and states.shape[1] > em.shape[1]:   # tokens inserted into the encoder are seen by the decoder
                kwargs["encoder_attention_mask"] = torch.cat([em.new_ones(len(em), states.shape[1] - em.shape[1]), em], 1)
        keymask = mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None
        memory = None                                       # a cache, or a decoder that may be about to make one
        if past is not None or (s.embed == "ids" and not torch.is_grad_enabled()):
            memory = remembering(past) if past is not None else {}
            if not seen:
                memory.clear()
        given = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
        self.proto = dict(fixed=s.fixed, causal=s.causal, decoding=bool(seen), memory=memory, keymask=keymask, given=given)
        self.tokens = self.again = None
        if s.embed == "ids" and (port := self.embed_port()) is not None and port.live:
            args, kwargs = self._embed(port, module, args, kwargs, n)
        return args, kwargs

    def _embed(self, port, module, args, kwargs, n):
        """A decoder's embedding: run it here and hand the stream over as inputs_embeds, so that the model itself builds
        positions and causal masks for the tokens that were inserted."""
        h = kwargs.get("inputs_embeds")
        if h is None:
            ids = kwargs.pop("input_ids", None)
            if ids is None:
                ids, args = args[0], args[1:]
            h = self.stack.embed_module(ids)
        if n and self.proto["keymask"] is not None and not self.proto["decoding"]:
            full = self.proto["keymask"]                    # insert() lengthens it itself
            self.proto["keymask"] = torch.cat([full[:, :self.stack.fixed], full[:, self.stack.fixed + n:]], 1)
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = port.through(h)
        return args, kwargs

    def take(self, h):
        """The running Tokens with stream h; fresh ones where none run or the stream has been re-cut since."""
        t = self.tokens
        if t is not None and t.h is not None and t.h.shape[:2] == h.shape[:2]:
            return replace(t, h=h)
        proto = dict(self.proto or dict(fixed=self.stack.fixed, causal=self.stack.causal))
        self.frames = proto["frames"] = rows_together() if self.proto else self.frames        # as it was, where blocks run again
        mask, lanes = proto.get("keymask"), {}
        if mask is not None and mask.shape[1] >= h.shape[1]:
            lanes["mask"] = mask[:, mask.shape[1] - h.shape[1]:, None]
        return Tokens(h, lanes, **proto)

    def leave(self, module, args, out):
        """Inserted tokens leave before heads that must not see them."""
        t = self.tokens
        if t is None or not t.spans or self.keeps():
            return out
        h = out[0] if isinstance(out, tuple) else out
        if h.shape[1] != t.h.shape[1]:
            return out
        t = replace(t, h=h)
        for name in list(t.spans):
            t = t.drop(name)
        self.tokens = t
        return (t.h, *out[1:]) if isinstance(out, tuple) else t.h

    def keeps(self):
        """An encoder whose decoder attends to it hands its inserted tokens on."""
        return self.stack.name == "encoder" and any(s.cross for s in self.host.towers)

    def after(self, module, args, kwargs, out):
        past = out.get("past_key_values") if hasattr(out, "get") else kwargs.get("past_key_values")
        if past is not None and hasattr(past, "__dict__"):
            past._luthier_inserted = self.inserted
            if self.proto["memory"] is not None and self.proto["memory"] is not past.__dict__.get("_luthier_memory"):
                remembering(past).update(self.proto["memory"])
        t = self.tokens
        if self.stack.embed == "ids" and t is not None and t.spans and not t.decoding and not self.keeps():
            lo = self.stack.fixed

            def cut(h):
                return torch.cat([h[:, :lo], h[:, lo + self.inserted:]], 1)

            if isinstance(out, tuple):
                out = (cut(out[0]), *out[1:])
            elif torch.is_tensor(out):
                out = cut(out)
            else:
                out["last_hidden_state"] = cut(out["last_hidden_state"])
        self.tokens = self.proto = None
        return out


def _length(past):
    if past is None or not hasattr(past, "get_seq_length"):
        return 0
    return int(past.get_seq_length())
