#include "library.h"

#include <dlfcn.h>

#include <tuple>
#include <utility>

namespace resm {
namespace {

void* open_first(const char* what, const std::vector<std::string>& names) {
  for (const auto& name : names) {
    // A second copy of a library that torch holds would have a second set of handles.
    if (name.find('/') != std::string::npos) continue;
    if (void* found = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return found;
  }
  std::string tried;
  for (const auto& name : names) {
    if (void* found = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
    const char* why = dlerror();
    tried += (tried.empty() ? "" : "; ") + (why ? std::string(why) : name);
  }
  throw CusolverError(std::string(what) + " was not found: " +
                      (tried.empty() ? "no candidates" : tried));
}

std::string path_of(void* symbol) {
  Dl_info info;
  return dladdr(symbol, &info) && info.dli_fname ? info.dli_fname : "";
}

}  // namespace

Library::Library(const std::vector<std::string>& solver, const std::vector<std::string>& runtime) {
  void* const from_runtime = open_first("the CUDA runtime", runtime);
  void* const from_solver = open_first("cuSOLVER", solver);
  std::string absent;
#define RESM_FIND(name, result, arguments) \
  name = reinterpret_cast<decltype(name)>(dlsym(from_solver, #name));
  RESM_CUSOLVER(RESM_FIND)
#undef RESM_FIND
#define RESM_FIND(name, result, arguments)                             \
  name = reinterpret_cast<decltype(name)>(dlsym(from_runtime, #name)); \
  if (!name) absent += std::string(" ") + #name;
  RESM_CUDART(RESM_FIND)
#undef RESM_FIND
  const std::pair<const char*, bool> needed[] = {
      {"cusolverGetProperty", cusolverGetProperty},
      {"cusolverDnCreate", cusolverDnCreate},
      {"cusolverDnDestroy", cusolverDnDestroy},
      {"cusolverDnSetStream", cusolverDnSetStream},
      {"cusolverDnCreateParams", cusolverDnCreateParams},
      {"cusolverDnDestroyParams", cusolverDnDestroyParams}};
  for (const auto& [name, found] : needed)
    if (!found) absent += std::string(" ") + name;
  if (!absent.empty()) throw CusolverError("cuSOLVER or the CUDA runtime lacks" + absent);
}

std::map<std::string, std::string> Library::missing() const {
  const bool jacobi = cusolverDnCreateGesvdjInfo && cusolverDnDestroyGesvdjInfo;
  const std::tuple<const char*, bool, const char*> solvers[] = {
      {"gesvdj_batched",
       jacobi && cusolverDnSgesvdjBatched && cusolverDnSgesvdjBatched_bufferSize &&
           cusolverDnDgesvdjBatched && cusolverDnDgesvdjBatched_bufferSize,
       "11.4"},
      {"gesvda_batched",
       cusolverDnSgesvdaStridedBatched && cusolverDnSgesvdaStridedBatched_bufferSize &&
           cusolverDnDgesvdaStridedBatched && cusolverDnDgesvdaStridedBatched_bufferSize,
       "11.4"},
      {"syev_batched", cusolverDnXsyevBatched && cusolverDnXsyevBatched_bufferSize, "11.7.1"},
      {"syevd", cusolverDnXsyevd && cusolverDnXsyevd_bufferSize, "11.4"},
      {"syevdx", cusolverDnXsyevdx && cusolverDnXsyevdx_bufferSize, "11.4"},
      {"gesvdp", cusolverDnXgesvdp && cusolverDnXgesvdp_bufferSize, "11.4"},
      {"gesvdr", cusolverDnXgesvdr && cusolverDnXgesvdr_bufferSize, "11.4"},
      {"polar", cusolverDnXpolar && cusolverDnXpolar_bufferSize, "12.2"}};
  std::map<std::string, std::string> result;
  for (const auto& [name, found, since] : solvers)
    result[name] =
        found ? "" : std::string("needs cuSOLVER >= ") + since + ", found " + version();
  return result;
}

std::string Library::version() const {
  int parts[3] = {0, 0, 0};
  const libraryPropertyType properties[] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
  for (int i = 0; i < 3; ++i)
    check(cusolverGetProperty(properties[i], &parts[i]), "cusolverGetProperty");
  return std::to_string(parts[0]) + "." + std::to_string(parts[1]) + "." +
         std::to_string(parts[2]);
}

std::string Library::solver_path() const {
  return path_of(reinterpret_cast<void*>(cusolverDnCreate));
}

std::string Library::runtime_path() const {
  return path_of(reinterpret_cast<void*>(cudaStreamSynchronize));
}

void Library::check(cusolverStatus_t status, const char* call) const {
  if (status == CUSOLVER_STATUS_SUCCESS) return;
  std::string text = "status " + std::to_string(static_cast<int>(status));
#define RESM_NAME(name, value) \
  if (static_cast<int>(status) == value) text = #name;
  RESM_STATUS(RESM_NAME)
#undef RESM_NAME
  throw CusolverError(std::string(call) + ": " + text);
}

void Library::check(cudaError_t error, const char* call) const {
  if (error != cudaSuccess)
    throw CusolverError(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace resm
