// SPDX-License-Identifier: Apache-2.0
// The kernel table of one ISA. Included once by each isa_*.cpp, which says what a vector is.
#include "fprop_filters.h"
#include "fprop_pixels.h"
#include "fprop_pooled.h"
#include "fprop_winograd.h"
#include "pack_weights.h"
#include "wgrad_channels.h"
#include "wgrad_pixels.h"

namespace hetconv {
namespace HETCONV_NS {

template <class S, class A, class K = FilterColumns<A>>
static bool fprop(const Lowered& L, OffsetCache* cache, const Problem& p, const void* packed) {
  if constexpr (__is_same(S, float)) {
    if (L.winograd) return fprop_winograd<S, A>(L, cache, p, packed);
  }
  if (p.pool) return fprop_pooled<S, A, K>(L, cache, p, packed);
  if (L.form == Form::filters)
    fprop_filters<S, A, K>(L, cache, p, packed);
  else
    fprop_pixels<S, A>(L, cache, p, packed);
  return true;
}

}  // namespace HETCONV_NS

#define HETCONV_KERNELS(name)                                                                    \
  Kernels {                                                                                      \
    #name, HETCONV_VECTOR_BYTES, HETCONV_NS::kMaxPixelFilters, HETCONV_NS::kWgradColumns,        \
        HETCONV_NS::kWindowFilters, HETCONV_NS::kWindows, HETCONV_NS::kPermuted,                 \
        HETCONV_NS::kPermutedWindows,                                                            \
        {HETCONV_NS::fprop<float, float>, HETCONV_NS::fprop<double, double>,                     \
         HETCONV_NS::fprop<HETCONV_NS::bf16, float>, HETCONV_NS::fprop<HETCONV_NS::f16, float>}, \
        {HETCONV_NS::pack_weights<float>, HETCONV_NS::pack_weights<double>,                      \
         HETCONV_NS::pack_weights<float>, HETCONV_NS::pack_weights<float>},                      \
        {HETCONV_NS::wgrad_pixels<float, float>, HETCONV_NS::wgrad_pixels<double, double>,       \
         HETCONV_NS::wgrad_pixels<HETCONV_NS::bf16, float>,                                      \
         HETCONV_NS::wgrad_pixels<HETCONV_NS::f16, float>},                                      \
    {                                                                                            \
      HETCONV_NS::wgrad_channels<float, float>, HETCONV_NS::wgrad_channels<double, double>,      \
          HETCONV_NS::wgrad_channels<HETCONV_NS::bf16, float>,                                   \
          HETCONV_NS::wgrad_channels<HETCONV_NS::f16, float>                                     \
    }                                                                                            \
  }

}  // namespace hetconv
