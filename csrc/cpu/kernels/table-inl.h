// Closes an instruction-set file: its kernels, gathered in one table. MBP_LEVEL is the level's name.

template <typename T>
static constexpr Kernels<T> kernels_of() {
  return {reads_in_place<T>,   packed_size<T>,           pack_b<T>,        gemm<T>,
          gemm_accumulated<T>, workspace_bytes<T>,       relu_backward<T>, reduce<T, accumulator_t<T>>,
          reduce<T, double>,   add_up<accumulator_t<T>>, mse<T>,           bce_with_logits<T>,
          cross_entropy<T>,    store_scalar<T>,          layer_flow<T>,    moments<T>};
}

extern const KernelTable kTable;
const KernelTable kTable = {
    MBP_LEVEL,
    kTileRows,
    kTileCols<float>,
    kernels_of<double>(),
    kernels_of<float>(),
    kernels_of<bfloat16>(),
    kernels_of<float16>(),
};
