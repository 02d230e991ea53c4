// cuSOLVER and the CUDA runtime, opened at run time.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

namespace resm {

// A call into cuSOLVER or the CUDA runtime that failed.
struct CusolverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Never closed: CUDA's libraries have exit handlers, which must not be unmapped before they run.
class Library {
 public:
  // Opens the first of each list that can be: what the process already holds comes first.
  Library(const std::vector<std::string>& solver, const std::vector<std::string>& runtime);
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Per solver an empty text, or why this cuSOLVER does not have it.
  std::map<std::string, std::string> missing() const;
  std::string version() const;
  std::string solver_path() const;
  std::string runtime_path() const;

  void check(cusolverStatus_t status, const char* call) const;
  void check(cudaError_t error, const char* call) const;

#define RESM_POINTER(name, result, arguments) result(*name) arguments = nullptr;
  RESM_CUSOLVER(RESM_POINTER)
  RESM_CUDART(RESM_POINTER)
#undef RESM_POINTER
};

}  // namespace resm
