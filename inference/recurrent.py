"""The trained models run one token after the other: RWKV-7 and RWKV-6 as RNNs, the GPT with a cache of keys and values.

    model = formats.load("latest")                # or a file, a run's name, a record, a public model: formats.py
    state = model.new_state()                     # a plain value: clone(), branch(n), save(file)
    logits = model(tokens, state)                 # (B, T) int64 -> (B, T, V) fp32; the state moves on by T tokens

One token (T = 1) is the recurrent step: for RWKV constant time and memory wherever it stands. More at once (a prompt)
take the chunked parallel form of training, with the state carried in and out. Both are written here, apart from the
scripts, of which only the WKV operators are used; model.parallel() is the training script's own module with the same
weights, and `python sample.py CHECKPOINT --check` holds the three forms against each other. No command line: import it.
"""

import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))  # of the scripts, whose modules make the models
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
LOOK_UPS = ("emb.weight", "wte.weight", "wpe.weight")  # of which a token reads a row

# ----------------------------------------------------------------------------------------------------------------------
# State


class State:
    """What a model keeps of the tokens it has read: tensors by name, their dimension 1 the batch, and the position.

    A plain value: two states share no memory, nothing of it lies elsewhere. model(tokens, state) changes it in place.
    """

    def __init__(self, tensors, position=0):
        self.tensors, self.position = tensors, position

    def clone(self):
        return State({name: t.clone() for name, t in self.tensors.items()}, self.position)

    def branch(self, n):
        """A state of batch n from one of batch 1: n continuations of one prompt that was read once."""
        return State({name: t.repeat_interleave(n, dim=1) for name, t in self.tensors.items()}, self.position)

    def bytes(self):
        """Memory of the state in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def save(self, file, model, **more):
        """Write the state to a safetensors file, atomically, with what model.load_state() checks; more: plain facts."""
        facts = dict(model.identity(), position=self.position, **more)
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors.items()}
        header = dict(state=json.dumps(facts))
        write(file, lambda part: safetensors.torch.save_file(tensors, part, metadata=header))


def write(file, writer):
    """Call writer(path) for a path beside `file`, which then takes its place; or ValueError, and nothing is left."""
    file = Path(file)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        writer(part)
        with open(part, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(part, file)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # a full disk in Python's, torch's, its words
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"cannot write {file}: {reason}. Make room, set permissions or name another file.") from None
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Models
#
# B sequences, T tokens, C channels, H heads, N channels a head, L blocks, as in the training scripts. Activations and
# matrices have the model's dtype; the WKV state is fp32.


def rms(x):
    return F.rms_norm(x, (x.size(-1),))


class Model:
    """A trained model for generation: self(tokens, state). weights: {plain name: tensor}."""

    positions = math.inf  # tokens that a state can have read

    def __init__(self, config, weights, dtype="fp32", device="cpu", header=None, script=None):
        self.config, self.header, self.script = config, header or {}, script
        self.dtype, self.device, self.trained = dtype, torch.device(device), weights
        self.activations = DTYPES.get(dtype, torch.float32)
        self.parameters = sum(t.numel() for t in weights.values())
        self.C, self.N, self.L = config.width, config.headsz, config.layers
        self.H = self.C // self.N
        self.W, self.blocks = {}, [{} for _ in range(self.L)]  # names without and with "blocks.<l>."
        for name, t in weights.items():
            _, l, rest = name.split(".", 2) if name.startswith("blocks.") else (None, None, name)
            (self.W if l is None else self.blocks[int(l)])[rest] = self.prepare(name, t)
        for p in self.blocks:
            self.stack(p)
        if dtype == "int8":
            for p in (self.W, *self.blocks):
                p.update({name: Int8(t) for name, t in p.items() if self.quantized(name, t)})

    def prepare(self, name, t):
        """A weight as the forward pass takes it; vectors lose their dimensions of size 1."""
        t = t.squeeze() if t.dim() == 3 and t.size(0) == 1 else t
        # Copied, since tensors mapped from a file are unaligned, and sums then round differently.
        t = t.to(self.device, self.activations, copy=True).contiguous()
        if on_the_right(name):  # x @ w1 in training; here W is (rows out, rows in)
            return t.T if name.endswith("2") else t.T.contiguous()  # short rows: columns first is twice as fast
        return t

    def stack(self, p):
        """Change a block's weights to what saves small operations."""

    @staticmethod
    def quantized(name, t):
        """Whether dtype int8 rounds this weight: linear()'s matrices; of the embeddings a token reads one row."""
        return name.rpartition(".")[2] == "weight" and t.dim() == 2 and name not in LOOK_UPS or on_the_right(name)

    def quantize(self):
        """This model with its matrices in int8, a scale for each output channel; vectors, embeddings, state in fp32."""
        return type(self)(self.config, self.trained, "int8", self.device, self.header, self.script)

    def weight_bytes(self, read=False):
        """Memory of the weights as they are kept here; read: of those that every token reads, not the look-up's."""
        held = {id(t): t for p in (self.W, *self.blocks) for name, t in p.items() if not (read and name in LOOK_UPS)}
        return sum(t.nbytes for t in held.values() if isinstance(t, (Int8, torch.Tensor)))

    @property
    def vocab_size(self):
        """Token ids in use; the logits' last dimension is padded beyond it."""
        return self.config.vocab_size

    @property
    def step(self):
        return self.header.get("step")

    @property
    def label(self):
        """Script and step of a model of ours, name and kind of a public one."""
        header = self.header
        return f"{header['model']}, {header['layout']}" if "layout" in header else (
            f"{self.script.__name__}, step {self.step}")

    @functools.cached_property
    def hash(self):
        """sha256 over the names and bytes of the trained weights."""
        return weights_hash(self.trained)

    def identity(self):
        """What a saved state must agree in."""
        return dict(script=self.script.__name__, model_sha256=self.hash, dtype=self.dtype,
                    tokenizer_sha256=self.header.get("tokenizer_sha256"))

    def parallel(self):
        """The training script's own module with these weights and dtype: logits(tokens), (B, T) -> (B, T, V)."""
        if self.dtype == "int8":
            raise ValueError("int8 weights run recurrently only; load the model in fp32 or bf16 for the parallel form.")
        args = type(self.config)(**{f.name: getattr(self.config, f.name) for f in fields(self.config)})
        args.dtype, args.device = self.dtype, self.device.type
        if hasattr(args, "kernel"):
            args.kernel, args.fast_cuda = "torch", False
        if hasattr(args, "wind_cuda"):
            args.wind_cuda = False
        with torch.device("meta"):  # no time for starting values that are thrown away
            module = self.script.build_model(args)
            for name, t in self.trained.items():  # low ranks and vocabularies of official files go by other rules
                owner, _, leaf = name.rpartition(".")
                if getattr(module.get_submodule(owner), leaf).shape != t.shape:
                    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty(t.shape)))
        kinds = {name: t.dtype for name, t in module.state_dict().items()}
        weights = {name: t.to(self.device, kinds[name], copy=True) for name, t in self.trained.items()}
        module.load_state_dict(weights, assign=True)
        return module.eval()

    def load_state(self, file):
        """A state saved by State.save and the facts saved with it. Raises ValueError when it is not this model's."""
        try:
            with safetensors.safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {})["state"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            theirs, position = {key: facts.get(key) for key in self.identity()}, facts["position"]
            if type(position) is not int or position < 0:
                raise ValueError(f"its position is {position}")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, safetensors.SafetensorError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{file} is no saved state ({reason}). Make one: sample.py --save_state FILE.") from None
        for key, value in self.identity().items():
            if theirs[key] != value:
                raise ValueError(f"{file} is a state of another model: its {key} is {theirs[key]}, this one's {value}.")
        fresh = self.new_state(1).tensors
        for name in {*fresh, *tensors}:
            ours, saved = (t[name].shape if name in t else None for t in (fresh, tensors))
            comparable = ours is not None and saved is not None and len(ours) == len(saved)
            if not comparable or self.shape_key(ours) != self.shape_key(saved):
                raise ValueError(f"{file} does not fit: its tensor {name} is {saved and tuple(saved)}, the model's is "
                                 f"{ours and tuple(ours)}.")
        if len(batches := {t.size(1) for t in tensors.values()}) > 1:
            raise ValueError(f"{file} does not fit: its tensors are of batches {', '.join(map(str, sorted(batches)))}.")
        if "k" in tensors and not position <= tensors["k"].size(3) == tensors["v"].size(3):
            raise ValueError(f"{file} does not fit: its keys and values are not those of {position} tokens.")
        return State({name: t.to(self.device) for name, t in tensors.items()}, position), facts

    @staticmethod
    def shape_key(shape):
        """The part of a state tensor's shape that must agree: not the batch."""
        return shape[0], *shape[2:]

    def prefill(self, tokens, state, chunk=512):
        """Read tokens (B, T), any T >= 1, in pieces of `chunk`. Returns the logits after the last, (B, 1, V)."""
        for part in tokens.split(chunk, dim=1):
            logits = self(part, state, last=True)
        return logits

    @torch.inference_mode()
    def __call__(self, tokens, state, last=False):
        """Logits (B, T, V) fp32 after each of the tokens (B, T) int64, or (B, 1, V) after the last. Moves state on."""
        z = self.forward(tokens.to(self.device), state, last)
        state.position += tokens.size(1)
        return z

    def change(self, x, before):
        """x_{t-1} - x_t for x (B, T, C), x_{-1} being what came before, (B, C), which then becomes the last of x."""
        past = before[:, None] if x.size(1) == 1 else torch.cat((before[:, None], x[:, :-1]), 1)
        change = past - x
        before.copy_(x[:, -1])
        return change

    def softcap(self, z):
        z, cap = z.float(), self.config.softcap
        return z.div_(cap).tanh_().mul_(cap) if cap else z


class RWKV7(Model):
    """S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t a head: state (H, N, N) a block."""

    def new_state(self, batch=1):
        """S of the heads and the last inputs of time and channel mixing, all 0."""
        zeros = functools.partial(torch.zeros, device=self.device)
        return State(dict(wkv=zeros(self.L, batch, self.H, self.N, self.N),
                          att_x=zeros(self.L, batch, self.C, dtype=self.activations),
                          ffn_x=zeros(self.L, batch, self.C, dtype=self.activations)))

    def prepare(self, name, t):
        if name.endswith(".lambdas"):  # in fp32, as training keeps them with bf16 too
            return t.to(self.device, torch.float32)
        return super().prepare(name, t)

    def stack(self, p):
        """The six mixes of the token shift become one tensor; 1 - k_a and the lambdas' values are ready."""
        p["att.x"] = torch.stack([p.pop(f"att.x_{j}") for j in "rwkvag"])[:, None, None]  # (6, 1, 1, C)
        p["att.1-k_a"] = 1 - p["att.k_a"]
        p["lambdas"] = p["lambdas"].tolist() if "lambdas" in p else None

    def forward(self, tokens, state, last):
        W, C = self.W, self.C
        norm = lambda x, p, name: F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])
        x = F.embedding(tokens, W["emb.weight"])  # (B, T, C)
        x = x0 = rms(x) if self.config.rms_norm else norm(x, self.blocks[0], "ln0")
        v_first = None
        states = (state.tensors[name].unbind() for name in ("att_x", "ffn_x", "wkv"))
        for p, att_x, ffn_x, S in zip(self.blocks, *states):
            if p["lambdas"]:
                x = torch.add(p["lambdas"][0] * x, x0, alpha=p["lambdas"][1])
            y, v_first = self.time_mix(p, norm(x, p, "ln1"), v_first, att_x, S)
            x = x + y
            x = x + self.channel_mix(p, norm(x, p, "ln2"), ffn_x)
        x = x[:, -1:] if last else x
        return self.softcap(linear(rms(x) if self.config.rms_norm else norm(x, W, "ln_out"), W["head.weight"]))

    def time_mix(self, p, x, v_first, before, S):
        B, T, C = x.shape
        r, w, k, v, a, g = torch.addcmul(x, self.change(x, before), p["att.x"]).unbind()  # (B, T, C) each
        if v_first is not None:
            mix = linear(linear(v, p["att.v1"]), p["att.v2"], p["att.v0"], "sigmoid")
        d = linear(linear(w, p["att.w1"], None, "tanh"), p["att.w2"], p["att.w0"])
        alpha = linear(linear(a, p["att.a1"]), p["att.a2"], p["att.a0"], "sigmoid")
        g = linear(linear(g, p["att.g1"], None, "sigmoid"), p["att.g2"])
        r, k, v = (linear(t, p[f"att.{name}.weight"]) for t, name in ((r, "receptance"), (k, "key"), (v, "value")))
        v_first, v = (v, v) if v_first is None else (v_first, torch.lerp(v, v_first, mix))
        heads = lambda t: t.view(B, T, self.H, self.N)
        kappa = heads(k * p["att.k_k"]).float()
        kappa = (kappa / torch.linalg.vector_norm(kappa, dim=-1, keepdim=True).clamp_min_(1e-12)).to(x.dtype)
        k = k * torch.addcmul(p["att.1-k_a"], alpha, p["att.k_a"])
        r, w, k, v, alpha = map(heads, (r, d, k, v, alpha))
        if T == 1:
            y = self.step7(*(t.view(-1, 1, self.N).float() for t in (r, w, k, v, kappa, alpha)), S).to(x.dtype)
        else:
            y, S_T = self.script.wkv7(r, w, k, v, -kappa, kappa * alpha, state=S, final=True)
            S.copy_(S_T)
        y = F.group_norm(y.reshape(B * T, C), self.H, p["att.ln_x.weight"], p["att.ln_x.bias"], eps=64e-5)
        y = torch.addcmul(heads(y), (r * k).mul_(p["att.r_k"]).sum(-1, keepdim=True), v)
        return linear(y.view(B, T, C).mul_(g), p["att.output.weight"]), v_first

    def step7(self, r, w, k, v, kappa, alpha, S):
        """One token: r w k v kappa alpha (BH, 1, N) fp32, S (B, H, N, N), changed in place. Returns y (BH, 1, N)."""
        S = S.flatten(0, 1)
        d = torch.sigmoid(w).mul_(-self.script.DECAY_BOUND).exp_()  # exp(-e^{-1/2} sigmoid(w))
        u = torch.bmm(kappa, S.mT).neg_()  # S a; row times matrix is several times as fast as matrix times column
        S.mul_(d).baddbmm_(torch.cat((u, v), 1).mT, torch.cat((kappa * alpha, k), 1))
        return torch.bmm(r, S.mT)

    def channel_mix(self, p, x, before):
        k = torch.addcmul(x, self.change(x, before), p["ffn.x_k"])
        return linear(linear(k, p["ffn.key.weight"], None, "relu").square_(), p["ffn.value.weight"])


class RWKV6(Model):
    """y_t = S_{t-1} r_t + (sum r u k) v_t, S_t = S_{t-1} diag(exp(-exp(w_t))) + v_t k_t^T: state (H, N, N) a block."""

    def new_state(self, batch=1):
        """S of the heads and the last input of time mixing, all 0."""
        zeros = functools.partial(torch.zeros, device=self.device)
        return State(dict(wkv=zeros(self.L, batch, self.H, self.N, self.N),
                          att_x=zeros(self.L, batch, self.C, dtype=self.activations)))

    def prepare(self, name, t):
        if name.endswith("att.u"):
            return t.to(self.device, torch.float32)
        t = super().prepare(name, t)
        if name == "emb.weight":  # which is the head too
            self.W["head.weight"] = t
        return t.mT.contiguous() if name.endswith("att.B") else t  # (5, C, 32)

    def stack(self, p):
        """The five mixes of the token shift become one."""
        p["att.x"] = torch.stack([p.pop(f"att.x_{j}") for j in "wkvrg"])[:, None, None]  # (5, 1, 1, C)

    def forward(self, tokens, state, last):
        W, C = self.W, self.C
        norm = lambda x, p, name: F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])
        x = self.config.emb_scale * F.embedding(tokens, W["emb.weight"])  # (B, T, C)
        for p, att_x, S in zip(self.blocks, state.tensors["att_x"].unbind(), state.tensors["wkv"].unbind()):
            x = x + self.time_mix(p, norm(x, p, "ln1"), att_x, S)
            k = linear(norm(x, p, "ln2"), p["ffn.key.weight"], None, "relu")
            x = x + linear(k.square_(), p["ffn.value.weight"])
        return linear(norm(x[:, -1:] if last else x, W, "ln_out"), W["head.weight"]).float()

    def time_mix(self, p, x, before, S):
        B, T, C = x.shape
        xx = self.change(x, before)
        m = linear(torch.addcmul(x, xx, p["att.x_x"]), p["att.A"], None, "tanh").view(B * T, 5, -1).transpose(0, 1)
        m = torch.bmm(m, p["att.B"].mT).view(5, B, T, C)
        w, k, v, r, g = torch.addcmul(x, xx, p["att.x"] + m).unbind()  # (B, T, C) each
        r, k, v = (linear(t, p[f"att.{name}.weight"]) for t, name in ((r, "receptance"), (k, "key"), (v, "value")))
        w = linear(linear(w, p["att.w1"], None, "tanh"), p["att.w2"], p["att.w0"])
        g, k = self.gate(p, g), self.key(k, w)
        r, k, v, w = (t.view(B, T, self.H, self.N) for t in (r, k, v, w))
        if T == 1:
            y = self.step6(*(t[:, 0].float() for t in (r, k, v, w)), p["att.u"], S).to(x.dtype)
        else:
            y, S_T = self.script.wkv6(r, k, v, w, p["att.u"], state=S, final=True)
            S.copy_(S_T)
        y = F.group_norm(y.reshape(B * T, C), self.H, p["att.ln_x.weight"], p["att.ln_x.bias"], eps=64e-5)
        return linear(y.view(B, T, C).mul_(g), p["att.output.weight"])

    def gate(self, p, g):
        return linear(linear(g, p["att.g1"], None, "tanh"), p["att.g2"])

    @staticmethod
    def key(k, w):
        return k * torch.exp(w.clamp(max=0))

    @staticmethod
    def step6(r, k, v, w, u, S):
        """One token: r k v w (B, H, N) fp32, u (H, N), S (B, H, N, N), changed in place. Returns y (B, H, N)."""
        y = torch.addcmul(torch.matmul(r[..., None, :], S.mT)[..., 0, :], (r * u).mul_(k).sum(-1, keepdim=True), v)
        S.mul_(torch.exp(w).neg_().exp_()[..., None, :]).addcmul_(v[..., :, None], k[..., None, :])
        return y


class GPT2(Model):
    """softmax(q k^T / sqrt(N)) v over all tokens so far, whose keys and values are kept: a state that grows."""

    def new_state(self, batch=1):
        """No keys and values yet, (L, B, H, tokens, N) each; room is made by doubling."""
        empty = lambda: torch.zeros(self.L, batch, self.H, 0, self.N, dtype=self.activations, device=self.device)
        return State(dict(k=empty(), v=empty()))

    @staticmethod
    def shape_key(shape):
        return shape[0], shape[2], shape[4]

    def stack(self, p):
        p["lambdas"] = p["lambdas"].tolist()

    @staticmethod
    def make_room(state, end):
        """... for the keys and values of `end` tokens."""
        room = state.tensors["k"].size(3)
        if end > room:
            more = (0, 0, 0, max(64, 2 * room, end) - room)
            state.tensors = {name: F.pad(t, more) for name, t in state.tensors.items()}

    def forward(self, tokens, state, last):
        W, end = self.W, state.position + tokens.size(1)
        self.make_room(state, end)
        n = torch.arange(0, self.N, 2, device=self.device, dtype=torch.float32)
        t = torch.arange(state.position, end, device=self.device, dtype=torch.float32)
        angle = torch.outer(t, 10000 ** (-n / self.N))[:, None]
        rotary = angle.cos().to(self.activations), angle.sin().to(self.activations)  # (T, 1, N/2)
        x = x0 = rms(F.embedding(tokens, W["wte.weight"]))  # (B, T, C)
        v_first = None
        for l, p in enumerate(self.blocks):
            x = torch.add(p["lambdas"][0] * x, x0, alpha=p["lambdas"][1])
            y, v_first = self.attention(l, rms(x), v_first, rotary, state)
            x = x + y
            k = linear(rms(x), p["mlp.key.weight"], None, "relu")
            x = x + linear(k.square_(), p["mlp.value.weight"])
        return self.softcap(linear(rms(x[:, -1:] if last else x), W["head.weight"]))

    def attention(self, l, x, v_first, rotary, state):
        p, (B, T, _) = self.blocks[l], x.shape
        q, k, v = (linear(x, p[f"att.{name}.weight"]).view(B, T, self.H, self.N) for name in ("query", "key", "value"))
        v_first = v if v_first is None else v_first
        v = torch.lerp(v, v_first, p["att.mix"])
        q, k = (self.rotate(rms(t), *rotary) for t in (q, k))
        return linear(self.attend(l, q, k, v, state), p["att.output.weight"]), v_first

    def attend(self, l, q, k, v, state):
        """Attention of q (B, T, H, N) to all tokens so far; k and v join those kept of block l. Returns (B, T, C)."""
        (B, T, _, _), start = q.shape, state.position
        keys, values = (state.tensors[name][l, :, :, :start + T] for name in "kv")  # (B, H, tokens, N)
        keys[:, :, start:], values[:, :, start:] = k.transpose(1, 2), v.transpose(1, 2)
        past = None if T == 1 else torch.ones(T, start + T, dtype=torch.bool, device=q.device).tril(start)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=past)  # (B, H, T, N)
        return y.transpose(1, 2).reshape(B, T, self.C)

    @staticmethod
    def rotate(x, cos, sin):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


FAMILIES = dict(train_rwkv7=RWKV7, train_rwkv6=RWKV6, train_gpt2=GPT2)


def weights_hash(weights):
    """sha256 over the names and bytes of {name: tensor}."""
    digest = hashlib.sha256()
    for name, t in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def on_the_right(name):
    """Whether a matrix of the RWKV scripts stands on the right of its product, x @ W."""
    return name.rpartition(".")[2] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "A")


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, W, bias=None, then=None):
    """then(W x + bias) for W (rows out, rows in); then: None, "sigmoid", "tanh" or "relu".

    On a CPU in fp32 by oneDNN, which at one row reads a large W two to three times as fast as F.linear (dev/LOG.md);
    its call takes 10 us more.
    """
    if isinstance(W, Int8):
        y = W.product(x) if bias is None else W.product(x).add_(bias)
    elif ONEDNN and x.is_cpu and x.dtype == torch.float32 and W.numel() >= 1 << 17 and W.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise.default(x, W, bias, then or "none", [], "")
    else:
        y = F.linear(x, W, bias)
    return getattr(y, then + "_")() if then else y


class Int8:
    """A matrix (rows out, rows in) as int8 and a scale for each row out: its largest magnitude is about 127 of them."""

    def __init__(self, W):
        W = W.float()
        self.scale = (W.abs().amax(1) * (1.002 / 127)).clamp_min(1e-12).bfloat16()  # rounded down it is still enough
        self.rounded = (W / self.scale[:, None]).round_().to(torch.int8).contiguous()
        self.nbytes = self.rounded.nbytes + self.scale.nbytes

    def product(self, x):
        """W x. Few rows of x: torch's weight-only product, x in bf16. Many: by W again in fp32.

        torch 2.13's product reads beyond the rows' ends, and may crash, unless they are multiples of 16 long; 32, which
        all the scripts' sizes are, leaves a margin for CPUs that were not tried.
        """
        if x.numel() > 16 * x.size(-1) or x.size(-1) % 32 or not x.is_cpu:
            return linear(x, self.rounded.float() * self.scale[:, None])
        y = torch._weight_int8pack_mm(x.bfloat16().view(-1, x.size(-1)), self.rounded, self.scale)
        return y.float().view(*x.shape[:-1], -1)
