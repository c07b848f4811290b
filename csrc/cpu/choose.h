// SPDX-License-Identifier: Apache-2.0
// A number that is known when a program runs becomes a template's argument: a kernel is chosen.
#pragma once
#include <type_traits>
#include <utility>

namespace hetconv {
namespace HETCONV_NS {

template <class Kernel, class F, int... n>
static Kernel choose_of([[maybe_unused]] int number, [[maybe_unused]] F of,
                        std::integer_sequence<int, n...>) {
  Kernel found = nullptr;
  (void)((number == n + 1 && (found = of(std::integral_constant<int, n + 1>()), true)) || ...);
  return found;
}

// of(number), a constant, for a number from 1 to N; nullptr for others.
template <class Kernel, int N, class F> static Kernel choose(int number, F of) {
  return choose_of<Kernel>(number, of, std::make_integer_sequence<int, N>());
}

}  // namespace HETCONV_NS
}  // namespace hetconv
