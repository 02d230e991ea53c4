// One cuSOLVER handle with its stream and workspace: the calls.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "array.h"
#include "library.h"

namespace resm {

// What the final read of `status` says.
struct Outcome {
  std::vector<std::pair<std::int64_t, int>> failed;  // batch entry, info
  std::vector<std::int64_t> nonfinite;               // batch entries that the caller had flagged
};

// Every call takes `status`, int32 2 x batch on the device: row 0 receives cuSOLVER's info, row 1
// holds the caller's flags. Both are read once, after the last call; then the stream is idle.
// Arguments: std::invalid_argument. Statuses of cuSOLVER and CUDA: CusolverError. The GIL is not
// held; `allocate` takes it. The solver's device has to be the thread's current one.
class Solver {
 public:
  // allocate(bytes) returns an object with data_ptr(), such as a torch.Tensor.
  Solver(std::shared_ptr<Library> library, int device, pybind11::function allocate);
  ~Solver();
  Solver(const Solver&) = delete;
  Solver& operator=(const Solver&) = delete;

  Outcome gesvdj_batched(const Array& a, const Array& left, const Array& values,
                         const Array& right, const Array& status, std::uintptr_t stream);
  Outcome gesvda_batched(const Array& a, std::int64_t rank, const Array& left,
                         const Array& values, const Array& right, const Array& status,
                         std::uintptr_t stream);
  Outcome syev_batched(const Array& a, const Array& values, const Array& status,
                       std::uintptr_t stream);
  Outcome syevd(const Array& a, const Array& values, const Array& status, std::uintptr_t stream);
  Outcome syevdx(const Array& a, std::int64_t count, const Array& values, const Array& status,
                 std::uintptr_t stream);
  // Also returns the perturbation of the singular values.
  std::pair<Outcome, double> gesvdp(const Array& a, const Array& left, const Array& values,
                                    const Array& right, const Array& status,
                                    std::uintptr_t stream);
  Outcome gesvdr(const Array& a, std::int64_t rank, std::int64_t oversampling,
                 std::int64_t iterations, const Array& left, const Array& values,
                 const Array& right, const Array& status, std::uintptr_t stream);
  // `certificate`: float64 1 x 3, zeroed by the caller: cuSOLVER 12.2.0 reads it.
  Outcome polar(const Array& a, const Array& hermitian, const Array& certificate,
                const Array& status, std::uintptr_t stream);

  // Gives the workspace back, unless a call is at work with it. With the GIL.
  void release();
  std::size_t device_bytes() const { return device_bytes_; }
  std::size_t host_bytes() const { return host_bytes_; }

 private:
  class Call;
  template <class T>
  Outcome gesvdj_batched_as(const Array&, const Array&, const Array&, const Array&, const Array&,
                            std::uintptr_t);
  template <class T>
  Outcome gesvda_batched_as(const Array&, std::int64_t, const Array&, const Array&, const Array&,
                            const Array&, std::uintptr_t);
  void* device_work(std::size_t bytes);
  void* host_work(std::size_t bytes);

  std::shared_ptr<Library> library_;
  int device_;
  pybind11::function allocate_;
  cusolverDnHandle_t handle_ = nullptr;
  cusolverDnParams_t params_ = nullptr;
  gesvdjInfo_t jacobi_ = nullptr;
  std::mutex mutex_;

  pybind11::object device_buffer_;
  void* device_pointer_ = nullptr;
  std::size_t device_bytes_ = 0;
  std::unique_ptr<std::byte[]> host_buffer_;
  std::size_t host_bytes_ = 0;
  // Outgrown in this call: the device may still use them.
  std::vector<pybind11::object> retired_device_;
  std::vector<std::unique_ptr<std::byte[]>> retired_host_;
};

}  // namespace resm
