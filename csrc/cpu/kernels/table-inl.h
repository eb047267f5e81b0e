// The table of a level, which isa.cpp knows it by. MBP_LEVEL is its name. With MBP_PRODUCTS_OF, only products of that type.

// Filled by name, since several fields have the same type: filled by position, a swap would compile.
template <typename T>
static constexpr Products<T> products_of() {
  Products<T> products{};
  products.reads_in_place = reads_in_place<T>;
  products.packed_size = packed_size<T>;
  products.pack = pack_b<T>;
  products.gemm = gemm<T>;
  products.gemm_accumulated = gemm_accumulated<T>;
  products.workspace_bytes = workspace_bytes<T>;
  return products;
}
#ifdef MBP_PRODUCTS_OF  // the level has only these of its own
extern const Products<MBP_PRODUCTS_OF> kProducts;
constexpr Products<MBP_PRODUCTS_OF> kProducts = products_of<MBP_PRODUCTS_OF>();
#else
template <typename T>
static constexpr Kernels<T> kernels_of() {
  Kernels<T> kernels{};
  static_cast<Products<T>&>(kernels) = products_of<T>();
  kernels.relu_backward = relu_backward<T>;
  kernels.sum_by_tiles = sum_by_tiles<T>;
  kernels.dropout = dropout<T>;
  kernels.reduce = reduce<T, accumulator_t<T> >;
  kernels.reduce_double = reduce<T, double>;
  kernels.add_up = add_up<accumulator_t<T> >;
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
#endif
