#include "async.h"

namespace emulator {
namespace {

std::vector<const char*> engines;  // by name
std::vector<std::function<void()>> under_way;

u32 first_engine() { return launch.cluster * static_cast<u32>(blocks[0].fibres.size()); }

bool land_one() {
  if (under_way.empty()) return false;
  std::swap(under_way[random_number() % under_way.size()], under_way.back());
  const std::function<void()> land = std::move(under_way.back());
  under_way.pop_back();
  land();
  ++progress;
  return true;
}

}  // namespace

void reset_async() {
  engines.clear();
  under_way.clear();
  reset_mbarriers();
  reset_stores();
  reset_products();
  reset_cluster();
}

u32 new_engine(const char* name, Pc pc) {
  if (engines.size() == launch.engines) {
    fail_here(pc, format("more than %u mbarriers, warps that multiply and threads that store in bulk", launch.engines));
  }
  engines.push_back(name);
  return first_engine() + static_cast<u32>(engines.size()) - 1;
}

std::string engine_name(u32 engine) { return engines[engine - first_engine()]; }

void see_engine(u32 engine, u32 count) {
  Fibre& f = *current;
  if (f.clock->of[engine] >= count) return;
  Clock* mine = clocks.copy(f.clock);
  mine->of[engine] = count;
  clocks.drop(f.clock);
  f.clock = mine;
}

void start(std::function<void()> land) { under_way.push_back(std::move(land)); }

bool land_something() { return land_one() || release_polls(); }

void land_early() {
  if (launch.seed % 2 == 1 && !under_way.empty() && random_number() % 4 == 0) land_one();
}

void land_at_exit(Fibre* f) {
  copies_land_at_exit(*f);
  stores_at_exit(f);
  products_at_exit(f);
  registers_at_exit();
}

}  // namespace emulator
