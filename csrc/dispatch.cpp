// Which kernels this CPU runs, and what Python asks about them (ops/cpu.py).

#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels.h"
#include "meter.h"

namespace gemlax {
namespace {

// The kernels of this name, or null where the CPU cannot run them.
const Kernels* find(const std::string& name) {
  if (name == kPortable.name) return &kPortable;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && name == kAvx2.name) return &kAvx2;
  if (avx2 && avx512 && name == kAvx512.name) return &kAvx512;
#endif
  return nullptr;
}

// What the environment asks for, or the fastest.
const Kernels* first_choice() {
  const char* wanted = std::getenv("GEMLAX_KERNELS");
  for (const char* name : {wanted ? wanted : "", "avx512", "avx2"})
    if (const Kernels* kernels = find(name)) return kernels;
  return &kPortable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{first_choice()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace gemlax

extern "C" const char* gemlax_kernels() { return gemlax::kernels().name; }

// The names of the formats in the order of their numbers, each followed by a space.
extern "C" const char* gemlax_formats() {
#define GEMLAX_NAME(name, F) #name " "
  return GEMLAX_FORMATS(GEMLAX_NAME);
}

// Choose kernels by name, or the first choice with an empty one; return whether this CPU runs them.
extern "C" bool gemlax_use(const char* name) {
  const gemlax::Kernels* kernels = *name ? gemlax::find(name) : gemlax::first_choice();
  if (kernels) gemlax::chosen().store(kernels);
  return kernels != nullptr;
}

// Calls and nanoseconds of each kind of `Metered`: 2 * kMetered numbers.
extern "C" void gemlax_totals(int64_t* out) {
  for (const gemlax::Total& total : gemlax::totals) {
    *out++ = total.calls.load();
    *out++ = total.nanoseconds.load();
  }
}
