// The table of a level, which isa.cpp knows it by. MBP_LEVEL is its name.

// Filled by name, since several fields have the same type: filled by position, a swap would compile.
template <typename T>
static constexpr Kernels<T> kernels_of() {
  Kernels<T> kernels{};
  kernels.reads_in_place = reads_in_place<T>;
  kernels.packed_size = packed_size<T>;
  kernels.pack = pack_b<T>;
  kernels.gemm = gemm<T>;
  kernels.gemm_accumulated = gemm_accumulated<T>;
  kernels.workspace_bytes = workspace_bytes<T>;
  kernels.relu_backward = relu_backward<T>;
  kernels.sum_by_tiles = sum_by_tiles<T>;
  kernels.dropout = dropout<T>;
  kernels.reduce = reduce<T, accumulator_t<T>>;
  kernels.reduce_double = reduce<T, double>;
  kernels.add_up = add_up<accumulator_t<T>>;
  kernels.loss = loss<T>;
  kernels.store = store_scalar<T>;
  kernels.narrow = narrow_numbers<T>;
  kernels.layer_flow = layer_flow<T>;
  kernels.moments = moments<T>;
  kernels.update = update<T>;
  return kernels;
}
static constexpr KernelTable table_of_level() {
  KernelTable table{};
  table.name = MBP_LEVEL;
  table.tile_rows = kTileRows;
  table.tile_cols = kTileCols<float>;
  table.gradient_rows = kGradientRows;
  table.gradient_cols = kGradientCols;
  table.f64 = kernels_of<double>();
  table.f32 = kernels_of<float>();
  table.bf16 = kernels_of<bfloat16>();
  table.f16 = kernels_of<float16>();
  return table;
}

extern const KernelTable kTable;
constexpr KernelTable kTable = table_of_level();
