"""Public models that no script here trains: OpenAI's GPT-2 and RWKV-6 "x060", token by token and all at once.

A class is the model as recurrent.py runs it, its state a plain value. The class after it is the parallel form, written
apart in plain torch: `python sample.py FILE --check` holds the two against each other, the
tests hold both against transformers and the rwkv package. formats.py makes them from files. No command line: import it.
"""

import torch
import torch.nn.functional as F

import recurrent
from recurrent import linear

GELU = dict(gelu_new="tanh", gelu_pytorch_tanh="tanh", gelu="none")  # by its name in a config.json


class GPT2(recurrent.GPT2):
    """x += W_o softmax(q k^T / sqrt(N)) v, x += W_2 gelu(W_1 x), each of LayerNorm(x); learned positions, biases; the
    head is the embedding (Radford et al. 2019). config.activation: a key of GELU."""

    @property
    def positions(self):
        return self.config.seq_len

    def prepare(self, name, t):
        t = super().prepare(name, t)
        if name == "wte.weight":
            self.W.setdefault("head.weight", t)  # unless the file has one of its own
        return t

    def stack(self, p):
        """No lambdas here."""

    def norm(self, x, p, name):
        return F.layer_norm(x, (self.C,), p[f"{name}.weight"], p[f"{name}.bias"])

    def forward(self, tokens, state, last):
        W, start, end = self.W, state.position, state.position + tokens.size(1)
        must_fit(end, self.config)
        self.make_room(state, end)
        x = F.embedding(tokens, W["wte.weight"]) + W["wpe.weight"][start:end]  # (B, T, C)
        for l, p in enumerate(self.blocks):
            x = x + self.attention(l, self.norm(x, p, "ln_1"), state)
            h = linear(self.norm(x, p, "ln_2"), p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
            h = F.gelu(h, approximate=GELU[self.config.activation])
            x = x + linear(h, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
        return linear(self.norm(x[:, -1:] if last else x, W, "ln_f"), W["head.weight"]).float()

    def attention(self, l, x, state):
        p, (B, T, _) = self.blocks[l], x.shape
        q, k, v = linear(x, p["attn.c_attn.weight"], p["attn.c_attn.bias"]).view(B, T, 3, self.H, self.N).unbind(2)
        y = self.attend(l, q, k, v, state)
        return linear(y, p["attn.c_proj.weight"], p["attn.c_proj.bias"])

    def parallel(self):
        return ParallelGPT2(self)


def must_fit(tokens, config):
    """ValueError where a text of so many tokens is longer than the model's learned positions."""
    if tokens > config.seq_len:
        raise ValueError(f"this GPT-2 has {config.seq_len} positions, {tokens} tokens do not fit. Take a shorter text.")


class Parallel:
    """All at once: logits(tokens), (B, T) -> (B, T, V), with the weights and the dtype of a model."""

    def __init__(self, model):
        if model.dtype == "int8":
            raise ValueError("int8 weights run recurrently only; load the model in fp32 or bf16 for the parallel form.")
        self.config, self.script = model.config, model.script
        self.W = {name: t.to(model.device, model.activations, copy=True) for name, t in model.trained.items()}

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.W[f"{name}.weight"].flatten(), self.W[f"{name}.bias"].flatten())


def gpt2_shapes(V, C, positions, hidden, layers, turned):
    """{name: shape} of a GPT-2's file; turned: its matrices stand as (in, out)."""
    shapes = {"wte.weight": (V, C), "wpe.weight": (positions, C)}
    matrices = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (hidden, C), "mlp.c_proj": (C, hidden)}
    for l in range(layers):
        for name, (rows, cols) in matrices.items():
            shapes[f"h.{l}.{name}.weight"] = (cols, rows) if turned else (rows, cols)
            shapes[f"h.{l}.{name}.bias"] = (rows,)
        shapes.update({f"h.{l}.{norm}.{part}": (C,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")})
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


class ParallelGPT2(Parallel):
    def logits(self, tokens):
        (B, T), C = tokens.shape, self.config.width
        must_fit(T, self.config)
        x = self.W["wte.weight"][tokens] + self.W["wpe.weight"][:T]
        for l in range(self.config.layers):
            W = {name.removeprefix(f"blocks.{l}."): t for name, t in self.W.items() if name.startswith(f"blocks.{l}.")}
            h = self.norm(x, f"blocks.{l}.ln_1") @ W["attn.c_attn.weight"].T + W["attn.c_attn.bias"]
            q, k, v = (t.view(B, T, -1, self.config.headsz).transpose(1, 2) for t in h.split(C, dim=-1))  # (B, H, T, N)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
            x = x + y @ W["attn.c_proj.weight"].T + W["attn.c_proj.bias"]
            h = self.norm(x, f"blocks.{l}.ln_2") @ W["mlp.c_fc.weight"].T + W["mlp.c_fc.bias"]
            h = F.gelu(h, approximate=GELU[self.config.activation])
            x = x + h @ W["mlp.c_proj.weight"].T + W["mlp.c_proj.bias"]
        return (self.norm(x, "ln_f") @ self.W.get("head.weight", self.W["wte.weight"]).T).float()


class X060(recurrent.RWKV6):
    """RWKV-6 "Finch" (arXiv 2404.05892) as its authors' files have it: the recurrence of train_rwkv6.py, its key not
    scaled, a SiLU gate of full rank, channel mixing with a token shift and a gate, LN_0, a head of its own."""

    def new_state(self, batch=1):
        """S of the heads and the last inputs of time and channel mixing, all 0."""
        state = super().new_state(batch)
        state.tensors["ffn_x"] = torch.zeros_like(state.tensors["att_x"])
        return state

    def prepare(self, name, t):
        if name == "emb.weight":  # which is not the head
            return recurrent.Model.prepare(self, name, t)
        return super().prepare(name, t)

    def forward(self, tokens, state, last):
        norm = lambda x, p, name: F.layer_norm(x, (self.C,), p[f"{name}.weight"], p[f"{name}.bias"])
        x = norm(F.embedding(tokens, self.W["emb.weight"]), self.blocks[0], "ln0")  # (B, T, C)
        states = (state.tensors[name].unbind() for name in ("att_x", "ffn_x", "wkv"))
        for p, att_x, ffn_x, S in zip(self.blocks, *states):
            x = x + self.time_mix(p, norm(x, p, "ln1"), att_x, S)
            x = x + self.channel_mix(p, norm(x, p, "ln2"), ffn_x)
        return linear(norm(x[:, -1:] if last else x, self.W, "ln_out"), self.W["head.weight"]).float()

    def gate(self, p, g):
        return F.silu(linear(g, p["att.gate.weight"]))

    @staticmethod
    def key(k, w):
        return k

    def channel_mix(self, p, x, before):
        xx = self.change(x, before)
        k = linear(torch.addcmul(x, xx, p["ffn.x_k"]), p["ffn.key.weight"], None, "relu").square_()
        r = linear(torch.addcmul(x, xx, p["ffn.x_r"]), p["ffn.receptance.weight"], None, "sigmoid")
        return r * linear(k, p["ffn.value.weight"])

    def parallel(self):
        return ParallelX060(self)


def x060_shapes(V, C, H, N, hidden, ranks):
    """{name: shape} of an x060 file; ranks: of the mixes and of the decay, a pair a block."""
    shapes = {"emb.weight": (V, C), "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    for l, (mix, decay) in enumerate(ranks):
        att, ffn = f"blocks.{l}.att.", f"blocks.{l}.ffn."
        for norm in ("ln1", "ln2", "att.ln_x"):
            shapes.update({f"blocks.{l}.{norm}.weight": (C,), f"blocks.{l}.{norm}.bias": (C,)})
        shapes.update({f"{att}time_maa_{letter}": (C,) for letter in "xwkvrg"})
        shapes.update({f"{att}{name}.weight": (C, C) for name in ("receptance", "key", "value", "gate", "output")})
        shapes.update({f"{att}time_maa_w1": (C, mix), f"{att}time_maa_w2": (5, mix // 5, C), f"{att}time_decay": (C,),
                       f"{att}time_decay_w1": (C, decay), f"{att}time_decay_w2": (decay, C),
                       f"{att}time_faaaa": (H, N), f"{ffn}time_maa_k": (C,), f"{ffn}time_maa_r": (C,),
                       f"{ffn}key.weight": (hidden, C), f"{ffn}receptance.weight": (C, C),
                       f"{ffn}value.weight": (C, hidden)})
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (V, C)}


class ParallelX060(Parallel):
    def logits(self, tokens):
        x = self.norm(self.W["emb.weight"][tokens], "blocks.0.ln0")  # (B, T, C)
        for l in range(self.config.layers):
            x = x + self.time_mix(f"blocks.{l}.att.", self.norm(x, f"blocks.{l}.ln1"))
            x = x + self.channel_mix(f"blocks.{l}.ffn.", self.norm(x, f"blocks.{l}.ln2"))
        return (self.norm(x, "ln_out") @ self.W["head.weight"].T).float()

    def time_mix(self, block, x):
        W = {name.removeprefix(block): t for name, t in self.W.items() if name.startswith(block)}
        (B, T, C), N = x.shape, self.config.headsz
        xx = F.pad(x, (0, 0, 1, -1)) - x
        low = torch.tanh((x + xx * W["x_x"]) @ W["A"]).view(B, T, 5, -1)
        mixes = torch.einsum("btjr,jrc->jbtc", low, W["B"])
        w, k, v, r, g = (x + xx * (W[f"x_{name}"] + mix) for name, mix in zip("wkvrg", mixes))
        w = W["w0"] + torch.tanh(w @ W["w1"]) @ W["w2"]
        r, k, v = (t @ W[f"{name}.weight"].T for t, name in ((r, "receptance"), (k, "key"), (v, "value")))
        r, k, v, w = (t.view(B, T, -1, N) for t in (r, k, v, w))
        y = self.script.wkv6(r, k, v, w, W["u"].float()).reshape(B * T, C)
        y = F.group_norm(y, C // N, W["ln_x.weight"].flatten(), W["ln_x.bias"].flatten(), eps=64e-5).view(B, T, C)
        return (y * F.silu(g @ W["gate.weight"].T)) @ W["output.weight"].T

    def channel_mix(self, block, x):
        xx = F.pad(x, (0, 0, 1, -1)) - x
        k = torch.relu((x + xx * self.W[f"{block}x_k"]) @ self.W[f"{block}key.weight"].T) ** 2
        r = torch.sigmoid((x + xx * self.W[f"{block}x_r"]) @ self.W[f"{block}receptance.weight"].T)
        return r * (k @ self.W[f"{block}value.weight"].T)
