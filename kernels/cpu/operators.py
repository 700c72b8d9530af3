"""The CPU's operators: each is one jt.code operation over the headers in this folder."""

import weakref

from moss_jt.backend import jt
from moss_jt.config import MossConfig
from moss_jt.kernels.checks import check_cache, check_dtype, check_matrix, check_shape
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cpu.source import run
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Var
from moss_jt.kernels.rotary import rotary_table

GROUP = 128  # positions per group of attention.h

EMBED = """
moss::run_embed((const int32_t*)in0_p, in0_shape0, (const uint16_t*)in1_p, in1_shape1, (float*)out0_p);
"""

HEAD = """
moss::Head head{};
head.h = (const float*)in0_p;
head.norm_weight = (const uint16_t*)in1_p;
head.norm_bias = (const uint16_t*)in2_p;
head.weight = moss::Dense{(const uint16_t*)in3_p, in3_shape0, in3_shape1};
head.bias = (const uint16_t*)in4_p;
head.logits = (float*)out0_p;
head.normed = (float*)out1_p;
head.rows = in0_shape0;
head.epsilon = (float)data["epsilon"];
moss::run_head(head);
"""

BLOCK = """
moss::Block<moss::MATRIX> block{};
block.h = (const float*)in0_p;
block.norm_weight = (const uint16_t*)in1_p;
block.norm_bias = (const uint16_t*)in2_p;
block.fc_in_bias = (const uint16_t*)in3_p;
block.fc_out_bias = (const uint16_t*)in4_p;
block.rotary = (const float*)in5_p;
const int64_t layer = (int64_t)data["layer"] * in6_shape1 * in6_shape2 * in6_shape3;
block.keys = (uint16_t*)in6_p + layer;
block.values = (uint16_t*)in7_p + layer;
block.result = (float*)out0_p;
block.workspace = (float*)out1_p;
block.tokens = in0_shape0;
block.start_pos = (int64_t)data["start_pos"];
block.heads = in6_shape2;
block.head_dim = in6_shape3;
block.pairs = in5_shape2;
block.epsilon = (float)data["epsilon"];
MATRICES
moss::run_block(block);
"""

DENSE_MATRICES = "".join(
    f"block.{name} = moss::Dense{{(const uint16_t*)in{i}_p, in{i}_shape0, in{i}_shape1}};\n"
    for i, name in enumerate(("qkv", "out_proj", "fc_in", "fc_out"), start=8)
)
DENSE_BLOCK = BLOCK.replace("MATRICES", DENSE_MATRICES).replace("MATRIX", "Dense")


class CpuOperators:
    """See :class:`moss_jt.kernels.interface.Operators`.

    For passes of 1 to 23 tokens, each token's result is the same, bit for bit, however many tokens share the pass.

    Args:
        config: the model's geometry.
        simd: 512 (AVX-512), 256 (AVX2) or 0 (plain C++); by default the widest, or what MOSS_JT_SIMD says.

    Raises:
        ValueError: head_dim is odd, or this machine does not have ``simd``.
    """

    def __init__(self, config: MossConfig, simd: int | None = None) -> None:
        if config.head_dim % 2:
            raise ValueError(f"head_dim is {config.head_dim}; an even number is needed")
        self.config = config
        self.simd = chosen_simd() if simd is None else simd
        if self.simd not in available_simd():
            raise ValueError(f"simd {simd} is not among {available_simd()}")
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        # A block's weights, checked once, in the order of the operation's inputs.
        self._inputs: weakref.WeakKeyDictionary[BlockWeights, list[Var]] = weakref.WeakKeyDictionary()

    def embed(self, token_ids: Var, table: Var) -> Var:
        check_dtype("token_ids", token_ids, "int32")
        check_dtype("table", table, "float16")
        shape = (token_ids.shape[0], table.shape[1])
        return run(self.simd, "head.h", EMBED, [shape], [token_ids, table])[0]

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Var, bias: Var) -> Var:
        rows, width, vocab = h.shape[0], self.config.n_embd, weight.shape[0]
        check_shape("h", h, (rows, width))
        for name, var, shape in (
            ("norm_weight", norm_weight, (width,)),
            ("norm_bias", norm_bias, (width,)),
            ("weight", weight, (vocab, width)),
            ("bias", bias, (vocab,)),
        ):
            check_shape(name, var, shape)
            check_dtype(name, var, "float16")
        inputs = [h, norm_weight, norm_bias, weight, bias]
        data = {"epsilon": self.config.layer_norm_epsilon}
        return run(self.simd, "head.h", HEAD, [(rows, vocab), (rows, width)], inputs, data)[0]

    def block(self, h: Var, weights: BlockWeights, keys: Var, values: Var, layer: int, start_pos: int) -> Var:
        config, tokens = self.config, h.shape[0]
        check_shape("h", h, (tokens, config.n_embd))
        check_cache(keys, values, config.n_head, config.head_dim, layer, start_pos, tokens)
        if keys.shape[1] > config.n_positions:
            raise ValueError(f"the cache has {keys.shape[1]} positions; the model has {config.n_positions}")
        inputs = self._inputs.get(weights)
        if inputs is None:
            inputs = self._inputs[weights] = self._checked_inputs(weights)
        norm, matrices = inputs[:4], inputs[4:]
        data = {"layer": layer, "start_pos": start_pos, "epsilon": config.layer_norm_epsilon}
        shapes = [(tokens, config.n_embd), (self._workspace(tokens, start_pos),)]
        return run(
            self.simd, "block.h", DENSE_BLOCK, shapes, [h, *norm, self.rotary, keys, values, *matrices], data
        )[0]

    def _workspace(self, tokens: int, start_pos: int) -> int:
        """Floats that Workspace in block.h takes."""
        config = self.config
        groups = -(-(start_pos + tokens) // GROUP)
        partial = config.n_head * groups * (config.head_dim + 2)
        return tokens * (6 * config.n_embd + 2 * config.n_inner + partial)

    def _checked_inputs(self, weights: BlockWeights) -> list[Var]:
        width, inner = self.config.n_embd, self.config.n_inner
        vectors = {
            "ln_1_weight": (weights.ln_1_weight, width),
            "ln_1_bias": (weights.ln_1_bias, width),
            "fc_in_bias": (weights.fc_in_bias, inner),
            "fc_out_bias": (weights.fc_out_bias, width),
        }
        for name, (vector, length) in vectors.items():
            check_shape(name, vector, (length,))
            check_dtype(name, vector, "float16")
        matrices = {
            "qkv": (weights.qkv, 3 * width, width),
            "out": (weights.out, width, width),
            "fc_in": (weights.fc_in, inner, width),
            "fc_out": (weights.fc_out, width, inner),
        }
        inputs = [vector for vector, _ in vectors.values()]
        for name, (matrix, outputs, k) in matrices.items():
            check_matrix(name, matrix, outputs, k)
            if isinstance(matrix, DenseMatrix):
                inputs.append(matrix.weight)
        return inputs
