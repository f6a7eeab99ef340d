"""The C++ template of every fused GEMM: prepare the activation's rows, then tiles of dot products, then the epilogue.

What differs between formats is in the headers: how a row is prepared (quantized, or decoded) and the tile. Bias and
whatever Inductor fuses after the GEMM run on the float32 tile while it is in cache.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from quark_inductor.lowering._inductor import (
    DTYPE_TO_CPP,
    CppTemplate,
    CppTemplateCaller,
    CppTemplateKernel,
    Placeholder,
    V,
    check_all_epilogues,
    config,
    gen_2d_view_of_epilogue_buf,
    get_export_declaration,
    ir,
    ops,
    parallel_num_threads,
    realized_inputs,
    select_choice,
    sympy_index_symbol,
    timed,
    view,
)
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp.kernels import kernel_for
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.ops import dtype_of

_SOURCE = r"""
{{template.header().getvalue()}}
{{"#define QUARK_AVX512" if avx512 else ""}}
{{"#define QUARK_AVX2" if avx2 else ""}}
{{headers}}
extern "C" {{export}}
{{kernel.def_kernel(inputs=inputs, outputs={"y": Y}, aliases=aliases)}}
{
  {{kernel.maybe_codegen_profile()}}
  using namespace quark::{{chosen.namespace}};
  using T = {{T}};
  const int64_t M = {{kernel.size(GemmOut, 0)}};
  constexpr int64_t N = {{N}}, K = {{K}}, MT = {{MT}}, NT = {{NT}};
  constexpr int64_t n_tiles = (N + NT - 1) / NT;
{%- if chosen.before %}
  {{chosen.before}};
{%- endif %}
  const int64_t most = std::min<int64_t>(M, {{rows_at_a_time}});
  uint8_t* const rows = quark::kept_memory<0>({{chosen.rows_bytes}});
{%- for name in strides %}
  const auto* const {{name}}_of_all = {{name}};
{%- endfor %}
  #pragma omp parallel num_threads({{num_threads}})
  {
  float* const tile = reinterpret_cast<float*>(quark::kept_memory<1>(MT * NT * 4));
{%- if chosen.scratch %}
  uint8_t* const scratch = quark::kept_memory<2>({{chosen.scratch}});
{%- endif %}
{%- if grouped %}
  // After the last expert come the rows of none.
  for (int64_t e = 0; e <= {{experts}}; e++) {
  const bool is_expert = e < {{experts}};
  const int64_t m_first = e == 0 ? 0 : offsets[e - 1], m_last = is_expert ? offsets[e] : M;
  if (m_first >= m_last) continue;
  const int64_t expert = is_expert ? e : 0;
{%- elif experts %}
  for (int64_t expert = 0; expert < {{experts}}; expert++) {
  const int64_t m_first = expert * (M / {{experts}}), m_last = m_first + M / {{experts}};
{%- endif %}
{%- if experts %}
{%- for name, stride in strides.items() %}
  const auto* const {{name}} = {{name}}_of_all + expert * {{stride}};
{%- endfor %}
{%- else %}
  const int64_t m_first = 0, m_last = M;
{%- endif %}
  for (int64_t m_begin = m_first; m_begin < m_last; m_begin += {{rows_at_a_time}}) {
    const int64_t m_stop = std::min<int64_t>(m_last, m_begin + {{rows_at_a_time}});
    const int64_t count = m_stop - m_begin, m_tiles = (count + MT - 1) / MT;
    #pragma omp for schedule(static)
    for (int64_t i = 0; i < {{"m_tiles * MT" if chosen.pads else "count"}}; i++) {
      const int64_t m = m_begin + i;
      {{chosen.prepare}};
    }
    #pragma omp for collapse(2) schedule(static)
    for (int64_t n_tile = 0; n_tile < n_tiles; n_tile++)
      for (int64_t m_tile = 0; m_tile < m_tiles; m_tile++) {
        const int64_t m_start = m_begin + m_tile * MT, m_end = std::min<int64_t>(m_stop, m_start + MT);
        const int64_t n_start = n_tile * NT, n_end = std::min<int64_t>(N, n_start + NT);
        {%- if grouped %}
        if (is_expert) {
          {{chosen.tile}};
          {%- if "bias" in inputs %}
          for (int64_t m = 0; m < m_end - m_start; m++)
            for (int64_t n = 0; n < n_end - n_start; n++) tile[m * NT + n] += float(bias[n_start + n]);
          {%- endif %}
        } else {
          std::fill(tile, tile + MT * NT, 0.0f);
        }
        {%- else %}
        {{chosen.tile}};
        {%- endif %}
        {%- if plain %}
        using Vec = at::vec::Vectorized<float>;
        for (int64_t m = m_start; m < m_end; m++) {
          const float* const sums = tile + (m - m_start) * NT;
          T* const out = y + m * N + n_start;
          int64_t n = 0;
          for (; n + Vec::size() <= n_end - n_start; n += Vec::size())
            at::vec::convert<T>(Vec::loadu(sums + n)).store(out + n, int(Vec::size()));
          for (; n < n_end - n_start; n++) out[n] = T(sums[n]);
        }
        {%- else %}
        {%- set _ = kernel.define_stack_allocated_buffer("tile", index.tile_sizes, torch.float) %}
        {%- set tile_y = kernel.slice_nd(Y_2d, index.ranges_of_y) %}
        {%- set tile_sum = kernel.slice_nd(kernel.local_buffers["tile"], index.ranges_of_tile) %}
        {{kernel.store_output(tile_y, tile_sum, GemmOut, epilogue_nodes, offsets=index.starts,
                              reindexers=reindexers)|indent(8, false)}}
        {%- endif %}
      }
  }
  }
{%- if experts %}
  }
{%- endif %}
}
"""


@functools.cache
def _template(source: str) -> Any:
    # Parsing costs more than rendering, and every Linear of a model renders the same few sources.
    return CppTemplate._template_from_string(source)


@functools.cache
def _headers(names: tuple[str, ...]) -> str:
    return "\n".join((Path(__file__).parent / f"{name}.h").read_text() for name in ("common", *names))


@dataclass(frozen=True, slots=True)
class _Index:
    """Variables of the template as Inductor's symbols. It also takes names, and parses them again for every kernel."""

    tile_sizes: tuple[Any, Any]
    starts: tuple[Any, Any]
    ranges_of_y: tuple[tuple[Any, Any], ...]
    ranges_of_tile: tuple[tuple[Any, Any], ...]


@functools.cache
def _index() -> _Index:
    names = ("MT", "NT", "m_start", "n_start", "m_end", "n_end")
    mt, nt, m_start, n_start, m_end, n_end = (sympy_index_symbol(name) for name in names)
    zero = m_start - m_start
    return _Index(
        tile_sizes=(mt, nt),
        starts=(m_start, n_start),
        ranges_of_y=((m_start, m_end), (n_start, n_end)),
        ranges_of_tile=((zero, m_end - m_start), (zero, n_end - n_start)),
    )


class CppQuarkGemm(CppTemplate):  # type: ignore[misc]
    """A fused GEMM as C++ source."""

    def __init__(self, target: Target, problem: GemmProblem, inputs: Mapping[str, Any], layout: Any) -> None:
        # The name becomes the kernel's: what a profile shows.
        super().__init__(f"quark_{problem.op}", list(inputs.values()), layout, parallel_num_threads())
        self.target, self.problem, self.inputs = target, problem, dict(inputs)
        self.multiplies = ""  # known when it is rendered

    def generate(self, **kwargs: Any) -> Any:
        """The choice, without the source that only a benchmark of several choices would read.

        ``CppTemplate.generate`` renders a kernel for it, and Inductor renders it again once it knows the epilogue: with
        hundreds of Linears that is seconds.
        """

        def make_kernel_render(
            template_node: Any, flag_template_buffer_has_other_users: bool, epilogue_nodes: list[Any] | None = None
        ) -> Any:
            kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=self.num_threads)
            return kernel, functools.partial(
                kernel.render,
                self,
                template_buffer_node=template_node,
                flag_template_buffer_has_other_users=flag_template_buffer_has_other_users,
                epilogue_nodes=epilogue_nodes,
            )

        name = f"cpp_{self.name}_{self.index}"
        nothing_to_benchmark: Any = None
        return CppTemplateCaller(
            name, self.name, self.input_nodes, self.layout, make_kernel_render, nothing_to_benchmark, self
        )

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """See ``torch._inductor.codegen.cpp_template.CppTemplate``."""
        with timed(f"render.{self.name}"):
            return self._render(kernel, template_buffer_node, flag_template_buffer_has_other_users, epilogue_nodes)

    def _render(
        self, kernel: Any, template_buffer_node: Any, has_other_users: bool | None, epilogue_nodes: list[Any] | None
    ) -> str:
        problem = self.problem
        output: Any = template_buffer_node if template_buffer_node is not None else self.output_node
        template_buffer = output
        gemm_out = ir.Buffer(
            name=f"{template_buffer.get_name()}_GemmOut",
            layout=ir.FixedLayout(self.layout.device, torch.float, self.layout.size, self.layout.stride),
        )
        # The chain of what happens to the float32 tile: bias and cast, then what the scheduler fused.
        chain = [
            ir.ComputedBuffer(
                name=template_buffer.get_name(), layout=template_buffer.layout, data=self._bias_and_cast(gemm_out)
            )
        ]
        reindexers: list[Any] = [None]
        aliases, output_2d = [gemm_out.get_name()], output
        if epilogue_nodes:
            if not has_other_users:
                aliases.append(template_buffer.get_name())
            chain += epilogue_nodes
            output = chain[-1]
            output_2d, reindexers = gen_2d_view_of_epilogue_buf(
                output, template_buffer, epilogue_nodes, reindexers, [None for _ in epilogue_nodes]
            )
        dtype = DTYPE_TO_CPP[self.layout.dtype]
        # Products of FP4 values and powers of two are exact in every dtype; those of FP8 values and scales are not, and
        # whoever asks Inductor for the rounding of eager code gets it.
        rounds_to = dtype if config.emulate_precision_casts else None
        # Generating code for an epilogue takes Inductor longer than all else of a kernel, and most Linears have none.
        plain = len(chain) == 1 and (problem.grouped or "bias" not in self.inputs)
        of_one = {n: _OfExpert(t) for n, t in self.inputs.items()} if problem.grouped else self.inputs
        chosen = kernel_for(self.target, problem, of_one, rounds_to, self.num_threads)
        self.multiplies = chosen.multiplies
        options: dict[str, Any] = {
            "kernel": kernel,
            "template": self,
            "torch": torch,
            "avx512": self.target.has("avx512_vnni"),
            "avx2": self.target.has("avx2"),
            "T": dtype,
            "chosen": chosen,
            "plain": plain,
            "headers": _headers(chosen.headers),
            "export": get_export_declaration(),
            "inputs": self.inputs,
            "aliases": {a: output.get_name() for a in aliases},
            "Y": output,
            "Y_2d": output_2d,
            "GemmOut": gemm_out,
            "epilogue_nodes": chain,
            "reindexers": reindexers,
            "index": _index(),
            "N": problem.n,
            "K": problem.k,
            "MT": min(problem.m or chosen.rows, chosen.rows),
            "NT": chosen.channels,
            "rows_at_a_time": chosen.rows_at_a_time,
            "num_threads": self.num_threads,
            "experts": problem.experts,
            "grouped": problem.grouped,
            "strides": _strides(self.inputs) if problem.grouped else chosen.experts,
        }
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(gemm_out)):
            return str(_template(_SOURCE).render(**options))

    def _bias_and_cast(self, gemm_out: Any) -> Any:
        # That of a grouped GEMM is another for each expert: the template adds it.
        bias, dtype = None if self.problem.grouped else self.inputs.get("bias"), self.layout.dtype
        load, load_bias = gemm_out.make_loader(), bias.make_loader() if bias is not None else None

        def inner(index: Any) -> Any:
            value = load(index)
            if load_bias is not None:
                value = ops.add(value, ops.to_dtype(load_bias([index[-1]]), torch.float))
            return ops.to_dtype(value, dtype)

        return ir.Pointwise(device=gemm_out.get_device(), dtype=dtype, inner_fn=inner, ranges=gemm_out.get_size())


@dataclass(frozen=True, slots=True)
class _OfExpert:
    """A tensor of a grouped GEMM, as that of one expert: without the dimension of the experts."""

    of_all: Any

    def get_size(self) -> list[Any]:
        """Shape."""
        return list(self.of_all.get_size()[1:])

    def get_stride(self) -> list[Any]:
        """Strides."""
        return list(self.of_all.get_stride()[1:])


def _strides(inputs: Mapping[str, Any]) -> dict[str, int]:
    """What lies between the entries of two experts, of every tensor that has some."""
    strides = {}
    for name, tensor in inputs.items():
        size = tensor.get_size()
        if size and (name.startswith("weight") or name == "bias" or (name.startswith("x_") and len(size) == 1)):
            strides[name] = math.prod(int(s) for s in size[1:])
    return strides


def lower(target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
    """Inductor IR of a fused op as one call of the template."""
    tensors = {name: a for name, a in args.items() if a is not None and not isinstance(a, str | int)}
    rows = tensors["x"].get_size()[:-1]
    batched = problem.experts and not problem.grouped
    if batched:
        *_, k = tensors["x"].get_size()
        tensors["x"] = view(tensors["x"], [rows[0] * rows[1], k])
    integers = problem.weight_format in ("int8", "uint8") and not problem.grouped
    strided = ("weight_scale", "weight_zero_point", *(() if problem.layout else ("weight",))) if integers else ()
    inputs = dict(zip(tensors, realized_inputs(tensors, strided), strict=True))
    size = [inputs["x"].get_size()[0], problem.n]
    layout = ir.FixedLayout(inputs["x"].get_device(), dtype_of(problem.dtype), size, [problem.n, 1])
    check_all_epilogues()
    choices: list[Any] = []
    CppQuarkGemm(target, problem, inputs, layout).maybe_append_choice(choices)
    result = select_choice(f"quark_{problem.op}", choices, list(inputs.values()), layout)
    return view(result, [*rows, problem.n]) if batched else result
