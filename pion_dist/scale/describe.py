"""What a prediction is about: models, layouts and clusters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer with grouped queries and gated MLPs, as Megatron stores it.

    Attributes:
        name: for tables.
        layers: of the decoder.
        hidden: width.
        ffn: of a dense layer's MLP; 0 where every layer has experts.
        heads: of queries.
        groups: of queries; keys and values have so many heads.
        head_dim: of a head.
        vocab: rows of the embedding and of the output layer, which are not tied.
        experts: of every layer, routed; 0 in dense models.
        top_k: experts that a token uses.
        expert_ffn: of a routed expert.
        shared_ffn: of the shared expert; 0 for none.
        tp: tensor parallelism that a layout has unless it is given.
        pp: pipeline stages, likewise.
        ep: expert parallelism, likewise.
    """

    name: str
    layers: int
    hidden: int
    ffn: int = 0
    heads: int
    groups: int
    head_dim: int = 128
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def layer_params(self, experts: int) -> int:
        """Elements of a layer's matrices with so many routed experts."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.groups)
        mlp = 3 * self.hidden * (self.ffn + self.shared_ffn + experts * self.expert_ffn)
        return attention + mlp + self.hidden * self.experts

    @property
    def params(self) -> int:
        """Elements of all matrices."""
        return self.layers * self.layer_params(self.experts) + 2 * self.vocab * self.hidden

    def train_flop(self, tokens: int, seq: int) -> float:
        """FLOP of forward and backward: 6 a parameter that a token uses, and causal attention."""
        used = self.layers * self.layer_params(self.top_k) + self.vocab * self.hidden
        attention = 6.0 * self.layers * self.heads * self.head_dim * seq
        return tokens * (6.0 * used + attention)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How GPUs share a model, with Megatron's names; routed experts are not cut (expert TP 1).

    Attributes:
        gpus: all.
        tp: tensor parallelism.
        pp: pipeline stages.
        cp: context parallelism.
        ep: expert parallelism.
        seq: tokens of a sample.
        batch: samples of an iteration.
        micro_batch: samples of a micro-batch.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    seq: int = 8192
    batch: int = 512
    micro_batch: int = 1

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def sharing(self) -> int:
        """Ranks that share out a stage's dense weights: data- and context-parallel ones."""
        return self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Ranks that share out an expert's weights."""
        return self.gpus // (self.pp * self.ep)

    @property
    def tokens(self) -> int:
        """Of an iteration."""
        return self.batch * self.seq

    @property
    def micro_batches(self) -> int:
        """Of a replica in an iteration."""
        return self.batch // (self.dp * self.micro_batch)

    def stage_layers(self, model: Model) -> int:
        """Layers of a pipeline stage, of one between the first and the last."""
        if model.layers % self.pp == 0:
            return model.layers // self.pp
        # --account-for-embedding-in-pipeline-split, and for the loss.
        return (model.layers + 2) // self.pp

    def check(self, model: Model) -> None:
        """Refuse what does not divide.

        Raises:
            ValueError: names the flag to change.
        """
        if small := [f"--{k.replace('_', '-')} {v}" for k, v in vars(self).items() if v < 1]:
            raise ValueError(f"{', '.join(small)}: must be 1 or more")
        for wrong, says in (*self._ranks_do_not_divide(), *self._model_does_not(model)):
            if wrong:
                raise ValueError(says)

    def _ranks_do_not_divide(self) -> list[tuple[bool, str]]:
        cut = self.tp * self.pp * self.cp
        replicas = max(1, self.dp) * self.micro_batch
        return [
            (
                self.gpus % cut > 0,
                f"--gpus {self.gpus} is not a multiple of --tp {self.tp} x --pp {self.pp} x --cp "
                f"{self.cp} = {cut}; change one of them",
            ),
            (
                self.gpus % (self.pp * self.ep) > 0,
                f"--ep {self.ep}: the {self.gpus // self.pp} GPUs of a stage are not a multiple "
                "of it; change --ep",
            ),
            (
                self.batch % replicas > 0,
                f"--batch {self.batch} is not a multiple of the {self.dp} data-parallel replicas "
                f"times --micro-batch {self.micro_batch}; change --batch",
            ),
        ]

    def _model_does_not(self, model: Model) -> list[tuple[bool, str]]:
        uncut = [x for x in (model.ffn, model.shared_ffn) if x % self.tp]
        return [
            (
                model.layers % self.pp > 0 and (model.layers + 2) % self.pp > 0,
                f"--pp {self.pp}: neither the {model.layers} layers nor, with the embedding and "
                "the loss counted, 2 more are a multiple of it; change --pp",
            ),
            (
                model.groups % self.tp > 0,
                f"--tp {self.tp}: the {model.groups} query groups of {model.name} are not a "
                f"multiple of it; take a --tp that divides {model.groups}",
            ),
            (
                bool(uncut),
                f"--tp {self.tp} does not divide an MLP of {uncut}; change --tp",
            ),
            (
                self.ep > 1 and not model.experts,
                f"--ep {self.ep}: {model.name} has no experts; leave --ep out",
            ),
            (
                model.experts % self.ep > 0,
                f"--ep {self.ep} does not divide the {model.experts} experts; change --ep",
            ),
        ]


# Shares reached are assumptions, no GPU was at hand; mfu is what arXiv 2407.21783, table 4, reports
# for Llama 405B on 8,192 and 16,384 H100 (0.38 to 0.43).
@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What its GPUs and links do, in FLOP/s, bytes/s and seconds; peaks, and shares reached.

    Attributes:
        name: for tables.
        bf16: FLOP/s of dense bf16 products.
        tf32: of TF32 ones.
        fp32: of IEEE float32 ones, outside the tensor cores.
        memory: bytes/s of the GPU's memory.
        capacity: bytes of it.
        node: GPUs that ``nvlink`` joins.
        nvlink: bytes/s of a GPU to the others of its node, one way.
        network: bytes/s of a GPU to other nodes, one way.
        host: bytes/s between a GPU and its host's memory, one way.
        latency: of a step of a collective within a node.
        network_latency: of one between nodes.
        launch: of a kernel.
        matmul: share of a peak that large products reach.
        solver: share of the float32 peak that Cholesky decompositions and inverses reach.
        stream: share of ``memory`` that elementwise work reaches.
        link: share of a link's rate that a collective reaches.
        mfu: share of ``bf16`` that forward and backward reach.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory: float
    capacity: float
    node: int = 8
    nvlink: float
    network: float
    host: float = 64e9
    latency: float = 5e-6
    network_latency: float = 15e-6
    launch: float = 5e-6
    matmul: float = 0.6
    solver: float = 0.25
    stream: float = 0.8
    link: float = 0.75
    mfu: float = 0.4
