// Chooses the build of the convolution for this processor and shares its tasks among workers.
#include "conv3x3.h"
#include "workers.h"

namespace flashvsr {

const Conv3x3Cpu* find_conv3x3_cpu(DType dtype, Isa isa) {
  struct Build {
    Isa isa;
    bool supported;
    const Conv3x3Cpu* (*kernels)(DType);
  };
  const Build builds[] = {
      // best first
#if defined(__x86_64__)
      {Isa::avx512, __builtin_cpu_supports("avx512f") != 0, conv3x3_avx512},
      {Isa::avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), conv3x3_avx2},
#endif
      {Isa::generic, true, conv3x3_generic}};
  for (const Build& build : builds)
    if (build.supported && (isa == Isa::best || isa == build.isa))
      if (const Conv3x3Cpu* kernels = build.kernels(dtype)) return kernels;
  return nullptr;
}

void run_conv3x3_cpu(const Conv3x3Params& p, const Conv3x3Cpu& kernels, const Workers& workers) {
  Conv3x3Plan plan;
  kernels.plan(p, workers.count, &plan);
  const Buffer weights = buffer(sizeof(float) * plan.weight_panel * plan.panels);
  const Buffer scratch = buffer(sizeof(float) * plan.scratch * workers.count);
  float* const weights_at = static_cast<float*>(weights.get());
  float* const scratch_at = static_cast<float*>(scratch.get());
  share(workers, int64_t(plan.panels) * plan.in_vectors, [&](int64_t n, int) {
    kernels.transform_weights(p, plan, int(n / plan.in_vectors), int(n % plan.in_vectors), weights_at);
  });
  share(workers, p.pictures * plan.down * plan.across, [&](int64_t n, int worker) {
    kernels.strip(p, plan, n, weights_at, scratch_at + worker * plan.scratch);
  });
}

}  // namespace flashvsr
