#include "solver.h"

#include <algorithm>
#include <string>
#include <type_traits>

namespace py = pybind11;

namespace resm {
namespace {

// Nothing here selects a device: to set one back in a thread that had none makes a context there.
bool is_current(const Library& library, int device) {
  int current = 0;
  return library.cudaGetDevice(&current) == cudaSuccess && current == device;
}

void expect_current(const Library& library, int device) {
  expect(is_current(library, device),
         "device " + std::to_string(device) + " is not the thread's current one");
}

cudaDataType data_type(const Array& array) { return array.itemsize == 8 ? CUDA_R_64F : CUDA_R_32F; }

// cuSOLVER reads the triangle that is the lower one of the caller's matrix.
cublasFillMode_t lower(const Matrices& a) {
  return a.transposed ? CUBLAS_FILL_MODE_UPPER : CUBLAS_FILL_MODE_LOWER;
}

void expect_square(const Matrices& a) {
  expect(a.rows == a.columns, "expected square matrices, got " + std::to_string(a.rows) + " x " +
                                  std::to_string(a.columns));
}

void expect_single(const Matrices& a) {
  expect(a.batch == 1, "expected one matrix, got " + std::to_string(a.batch));
}

void expect_packed(const Matrices& a, const char* name) {
  expect(a.batch == 1 || a.step == a.ld * a.columns,
         std::string(name) + ": this solver needs the matrices one directly after the other");
}

// The factors of the problem that cuSOLVER solves: those of A^T where A is read transposed.
std::pair<const Array*, const Array*> factors(const Matrices& a, const Array& left,
                                              const Array& right) {
  return a.transposed ? std::pair(&right, &left) : std::pair(&left, &right);
}

template <class T>
T* at(const Matrices& m, std::int64_t entry) {
  return reinterpret_cast<T*>(m.data) + entry * m.step;
}

int length(int lwork) {
  if (lwork < 0) throw CusolverError("cuSOLVER asks for a workspace that passes int32");
  return lwork;
}

}  // namespace

// One call of a solver: locks, sets the stream, and settles it before it ends.
class Solver::Call {
 public:
  Call(Solver& solver, const char* name, const Array& status, std::int64_t batch,
       std::uintptr_t stream)
      : solver_(solver),
        lock_(solver.mutex_),
        batch_(batch),
        stream_(reinterpret_cast<cudaStream_t>(stream)) {
    expect_current(*solver.library_, solver.device_);
    status_ = reinterpret_cast<int*>(vectors(status, "status", 'i', 4, 2, batch));
    const auto why = solver.library_->missing().at(name);
    if (!why.empty()) throw CusolverError(std::string(name) + ": " + why);
    auto& library = *solver.library_;
    library.check(library.cusolverDnSetStream(solver.handle_, stream_), "cusolverDnSetStream");
  }

  // After an error the device may still be at work on the buffers.
  ~Call() {
    if (!settled_) solver_.library_->cudaStreamSynchronize(stream_);
    solver_.retired_host_.clear();
    if (!solver_.retired_device_.empty()) {
      py::gil_scoped_acquire held;
      solver_.retired_device_.clear();
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int* info(std::int64_t entry) { return status_ + entry; }

  Outcome settle() {
    auto& library = *solver_.library_;
    std::vector<int> read(2 * batch_);
    library.check(library.cudaMemcpyAsync(read.data(), status_, read.size() * sizeof(int),
                                          cudaMemcpyDeviceToHost, stream_),
                  "cudaMemcpyAsync");
    library.check(library.cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    settled_ = true;
    Outcome outcome;
    for (std::int64_t i = 0; i < batch_; ++i) {
      if (read[batch_ + i])
        outcome.nonfinite.push_back(i);
      else if (read[i])
        outcome.failed.emplace_back(i, read[i]);
    }
    return outcome;
  }

 private:
  Solver& solver_;
  std::lock_guard<std::mutex> lock_;
  std::int64_t batch_;
  cudaStream_t stream_;
  int* status_ = nullptr;
  bool settled_ = false;
};

Solver::Solver(std::shared_ptr<Library> library, int device, py::function allocate)
    : library_(std::move(library)), device_(device), allocate_(std::move(allocate)) {
  auto& f = *library_;
  expect_current(f, device_);
  f.check(f.cusolverDnCreate(&handle_), "cusolverDnCreate");
  try {
    f.check(f.cusolverDnCreateParams(&params_), "cusolverDnCreateParams");
    if (f.cusolverDnCreateGesvdjInfo)
      f.check(f.cusolverDnCreateGesvdjInfo(&jacobi_), "cusolverDnCreateGesvdjInfo");
    if (f.cusolverDnSetDeterministicMode)
      f.check(f.cusolverDnSetDeterministicMode(handle_, CUSOLVER_DETERMINISTIC_RESULTS),
              "cusolverDnSetDeterministicMode");
  } catch (...) {
    if (jacobi_) f.cusolverDnDestroyGesvdjInfo(jacobi_);
    if (params_) f.cusolverDnDestroyParams(params_);
    f.cusolverDnDestroy(handle_);
    throw;
  }
}

Solver::~Solver() {
  // The runtime has gone, and the handles with it, or another device is current: a solver ends
  // with its thread, and elsewhere only at the end of the process.
  if (!is_current(*library_, device_)) return;
  if (jacobi_) library_->cusolverDnDestroyGesvdjInfo(jacobi_);
  library_->cusolverDnDestroyParams(params_);
  library_->cusolverDnDestroy(handle_);
}

void* Solver::device_work(std::size_t bytes) {
  bytes = std::max<std::size_t>(bytes, 1);
  if (bytes > device_bytes_) {
    py::gil_scoped_acquire held;
    py::object buffer = allocate_(bytes);
    auto* pointer = reinterpret_cast<void*>(buffer.attr("data_ptr")().cast<std::uintptr_t>());
    if (!pointer) throw CusolverError("the allocator returned no workspace");
    if (device_buffer_) retired_device_.push_back(std::move(device_buffer_));
    device_buffer_ = std::move(buffer);
    device_pointer_ = pointer;
    device_bytes_ = bytes;
  }
  return device_pointer_;
}

void* Solver::host_work(std::size_t bytes) {
  bytes = std::max<std::size_t>(bytes, 1);
  if (bytes > host_bytes_) {
    std::unique_ptr<std::byte[]> buffer(new std::byte[bytes]);
    if (host_buffer_) retired_host_.push_back(std::move(host_buffer_));
    host_buffer_ = std::move(buffer);
    host_bytes_ = bytes;
  }
  return host_buffer_.get();
}

void Solver::release() {
  const std::unique_lock<std::mutex> idle(mutex_, std::try_to_lock);
  if (!idle) return;
  device_buffer_ = py::object();
  device_pointer_ = nullptr;
  host_buffer_.reset();
  device_bytes_ = host_bytes_ = 0;
}

template <class T>
Outcome Solver::gesvdj_batched_as(const Array& a_, const Array& left, const Array& values_,
                                  const Array& right, const Array& status, std::uintptr_t stream) {
  constexpr int MOST_ROWS = 32;
  const Matrices a = matrices(a_, "matrices");
  expect(a.rows <= MOST_ROWS && a.columns <= MOST_ROWS,
         "gesvdj_batched takes at most 32 x 32, got " + std::to_string(a.rows) + " x " +
             std::to_string(a.columns));
  const auto [u_, v_] = factors(a, left, right);
  const Matrices u = output(*u_, a.transposed ? "right" : "left", a_, a.batch, a.rows, a.rows);
  const Matrices v =
      output(*v_, a.transposed ? "left" : "right", a_, a.batch, a.columns, a.columns);
  expect_packed(a, "matrices");
  expect_packed(u, "left or right");
  expect_packed(v, "left or right");
  const int m = static_cast<int>(a.rows), n = static_cast<int>(a.columns), k = std::min(m, n);
  const int lda = as_int(a.ld, "the leading dimension");
  const int ldu = as_int(u.ld, "the leading dimension"), ldv = as_int(v.ld, "the leading dimension");
  T* values = reinterpret_cast<T*>(vectors(values_, "values", 'f', sizeof(T), a.batch, k));
  const std::int64_t most = batch_per_call(a.batch, {a.step, u.step, v.step}, sizeof(T));

  Call call(*this, "gesvdj_batched", status, a.batch, stream);
  const auto& f = *library_;
  const auto [size, solve] = [&] {
    if constexpr (std::is_same_v<T, float>)
      return std::pair(f.cusolverDnSgesvdjBatched_bufferSize, f.cusolverDnSgesvdjBatched);
    else
      return std::pair(f.cusolverDnDgesvdjBatched_bufferSize, f.cusolverDnDgesvdjBatched);
  }();
  for (std::int64_t i = 0; i < a.batch; i += most) {
    const int count = static_cast<int>(std::min(most, a.batch - i));
    int lwork = 0;
    f.check(size(handle_, CUSOLVER_EIG_MODE_VECTOR, m, n, at<T>(a, i), lda, values + i * k,
                 at<T>(u, i), ldu, at<T>(v, i), ldv, &lwork, jacobi_, count),
            "cusolverDngesvdjBatched_bufferSize");
    auto* work = static_cast<T*>(device_work(sizeof(T) * length(lwork)));
    f.check(solve(handle_, CUSOLVER_EIG_MODE_VECTOR, m, n, at<T>(a, i), lda, values + i * k,
                  at<T>(u, i), ldu, at<T>(v, i), ldv, work, lwork, call.info(i), jacobi_, count),
            "cusolverDngesvdjBatched");
  }
  return call.settle();
}

Outcome Solver::gesvdj_batched(const Array& a, const Array& left, const Array& values,
                               const Array& right, const Array& status, std::uintptr_t stream) {
  return a.itemsize == 8 ? gesvdj_batched_as<double>(a, left, values, right, status, stream)
                         : gesvdj_batched_as<float>(a, left, values, right, status, stream);
}

template <class T>
Outcome Solver::gesvda_batched_as(const Array& a_, std::int64_t rank_, const Array& left,
                                  const Array& values_, const Array& right, const Array& status,
                                  std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrices");
  expect(a.rows >= a.columns,
         "gesvda_batched takes tall matrices by columns or wide ones by rows, got " +
             std::to_string(a.rows) + " x " + std::to_string(a.columns) + " by columns");
  expect(rank_ >= 1 && rank_ <= a.columns, "rank = " + std::to_string(rank_) +
                                               ": expected 1 to " + std::to_string(a.columns));
  const auto [u_, v_] = factors(a, left, right);
  const Matrices u = output(*u_, a.transposed ? "right" : "left", a_, a.batch, a.rows, rank_);
  const Matrices v = output(*v_, a.transposed ? "left" : "right", a_, a.batch, a.columns, rank_);
  const int m = as_int(a.rows, "rows"), n = as_int(a.columns, "columns");
  const int rank = as_int(rank_, "rank"), lda = as_int(a.ld, "the leading dimension");
  const int ldu = as_int(u.ld, "the leading dimension"), ldv = as_int(v.ld, "the leading dimension");
  T* values = reinterpret_cast<T*>(vectors(values_, "values", 'f', sizeof(T), a.batch, rank));
  const std::int64_t most = batch_per_call(a.batch, {a.step, u.step, v.step}, sizeof(T));

  Call call(*this, "gesvda_batched", status, a.batch, stream);
  const auto& f = *library_;
  const auto [size, solve] = [&] {
    if constexpr (std::is_same_v<T, float>)
      return std::pair(f.cusolverDnSgesvdaStridedBatched_bufferSize,
                       f.cusolverDnSgesvdaStridedBatched);
    else
      return std::pair(f.cusolverDnDgesvdaStridedBatched_bufferSize,
                       f.cusolverDnDgesvdaStridedBatched);
  }();
  for (std::int64_t i = 0; i < a.batch; i += most) {
    const int count = static_cast<int>(std::min(most, a.batch - i));
    T* s = values + i * rank;
    int lwork = 0;
    f.check(size(handle_, CUSOLVER_EIG_MODE_VECTOR, rank, m, n, at<T>(a, i), lda, a.step, s, rank,
                 at<T>(u, i), ldu, u.step, at<T>(v, i), ldv, v.step, &lwork, count),
            "cusolverDngesvdaStridedBatched_bufferSize");
    auto* work = static_cast<T*>(device_work(sizeof(T) * length(lwork)));
    // No residuals: they cost a product and a synchronisation.
    f.check(solve(handle_, CUSOLVER_EIG_MODE_VECTOR, rank, m, n, at<T>(a, i), lda, a.step, s, rank,
                  at<T>(u, i), ldu, u.step, at<T>(v, i), ldv, v.step, work, lwork, call.info(i),
                  nullptr, count),
            "cusolverDngesvdaStridedBatched");
  }
  return call.settle();
}

Outcome Solver::gesvda_batched(const Array& a, std::int64_t rank, const Array& left,
                               const Array& values, const Array& right, const Array& status,
                               std::uintptr_t stream) {
  return a.itemsize == 8
             ? gesvda_batched_as<double>(a, rank, left, values, right, status, stream)
             : gesvda_batched_as<float>(a, rank, left, values, right, status, stream);
}

Outcome Solver::syev_batched(const Array& a_, const Array& values_, const Array& status,
                             std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrices");
  expect_square(a);
  expect_packed(a, "matrices");
  char* values = vectors(values_, "values", 'f', a_.itemsize, a.batch, a.rows);
  const std::int64_t most = batch_per_call(a.batch, {a.step}, a_.itemsize);
  const auto type = data_type(a_);

  Call call(*this, "syev_batched", status, a.batch, stream);
  const auto& f = *library_;
  for (std::int64_t i = 0; i < a.batch; i += most) {
    const std::int64_t count = std::min(most, a.batch - i);
    char* matrix = a.data + i * a.step * a_.itemsize;
    char* w = values + i * a.rows * a_.itemsize;
    std::size_t on_device = 0, on_host = 0;
    f.check(f.cusolverDnXsyevBatched_bufferSize(handle_, params_, CUSOLVER_EIG_MODE_VECTOR,
                                                lower(a), a.rows, type, matrix, a.ld, type, w,
                                                type, &on_device, &on_host, count),
            "cusolverDnXsyevBatched_bufferSize");
    void *device = device_work(on_device), *host = host_work(on_host);
    f.check(f.cusolverDnXsyevBatched(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, lower(a), a.rows,
                                     type, matrix, a.ld, type, w, type, device, on_device, host,
                                     on_host, call.info(i), count),
            "cusolverDnXsyevBatched");
  }
  return call.settle();
}

Outcome Solver::syevd(const Array& a_, const Array& values_, const Array& status,
                      std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrix");
  expect_single(a);
  expect_square(a);
  char* values = vectors(values_, "values", 'f', a_.itemsize, 1, a.rows);
  const auto type = data_type(a_);

  Call call(*this, "syevd", status, 1, stream);
  const auto& f = *library_;
  std::size_t on_device = 0, on_host = 0;
  f.check(f.cusolverDnXsyevd_bufferSize(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, lower(a),
                                        a.rows, type, a.data, a.ld, type, values, type, &on_device,
                                        &on_host),
          "cusolverDnXsyevd_bufferSize");
  void *device = device_work(on_device), *host = host_work(on_host);
  f.check(f.cusolverDnXsyevd(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, lower(a), a.rows, type,
                             a.data, a.ld, type, values, type, device, on_device, host, on_host,
                             call.info(0)),
          "cusolverDnXsyevd");
  return call.settle();
}

Outcome Solver::syevdx(const Array& a_, std::int64_t count, const Array& values_,
                       const Array& status, std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrix");
  expect_single(a);
  expect_square(a);
  expect(count >= 1 && count <= a.rows,
         "count = " + std::to_string(count) + ": expected 1 to " + std::to_string(a.rows));
  // cuSOLVER's own W has n entries, of which the first `count` are set.
  char* values = vectors(values_, "values", 'f', a_.itemsize, 1, a.rows);
  const auto type = data_type(a_);
  const std::int64_t first = a.rows - count + 1;
  double unused = 0.0;
  std::int64_t found = 0;

  Call call(*this, "syevdx", status, 1, stream);
  const auto& f = *library_;
  std::size_t on_device = 0, on_host = 0;
  f.check(f.cusolverDnXsyevdx_bufferSize(handle_, params_, CUSOLVER_EIG_MODE_VECTOR,
                                         CUSOLVER_EIG_RANGE_I, lower(a), a.rows, type, a.data,
                                         a.ld, &unused, &unused, first, a.rows, &found, type,
                                         values, type, &on_device, &on_host),
          "cusolverDnXsyevdx_bufferSize");
  void *device = device_work(on_device), *host = host_work(on_host);
  f.check(f.cusolverDnXsyevdx(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, CUSOLVER_EIG_RANGE_I,
                              lower(a), a.rows, type, a.data, a.ld, &unused, &unused, first,
                              a.rows, &found, type, values, type, device, on_device, host,
                              on_host, call.info(0)),
          "cusolverDnXsyevdx");
  Outcome outcome = call.settle();
  if (outcome.failed.empty() && found != count)
    throw CusolverError("cusolverDnXsyevdx found " + std::to_string(found) +
                        " eigenvalues, expected " + std::to_string(count));
  return outcome;
}

std::pair<Outcome, double> Solver::gesvdp(const Array& a_, const Array& left,
                                          const Array& values_, const Array& right,
                                          const Array& status, std::uintptr_t stream) {
  constexpr int ECONOMY = 1;
  const Matrices a = matrices(a_, "matrix");
  expect_single(a);
  const std::int64_t k = std::min(a.rows, a.columns);
  const auto [u_, v_] = factors(a, left, right);
  const Matrices u = output(*u_, a.transposed ? "right" : "left", a_, 1, a.rows, k);
  const Matrices v = output(*v_, a.transposed ? "left" : "right", a_, 1, a.columns, k);
  char* values = vectors(values_, "values", 'f', a_.itemsize, 1, k);
  const auto type = data_type(a_);
  double perturbation = 0.0;

  Call call(*this, "gesvdp", status, 1, stream);
  const auto& f = *library_;
  std::size_t on_device = 0, on_host = 0;
  f.check(f.cusolverDnXgesvdp_bufferSize(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, ECONOMY,
                                         a.rows, a.columns, type, a.data, a.ld, type, values,
                                         type, u.data, u.ld, type, v.data, v.ld, type, &on_device,
                                         &on_host),
          "cusolverDnXgesvdp_bufferSize");
  void *device = device_work(on_device), *host = host_work(on_host);
  f.check(f.cusolverDnXgesvdp(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, ECONOMY, a.rows,
                              a.columns, type, a.data, a.ld, type, values, type, u.data, u.ld,
                              type, v.data, v.ld, type, device, on_device, host, on_host,
                              call.info(0), &perturbation),
          "cusolverDnXgesvdp");
  Outcome outcome = call.settle();
  return {std::move(outcome), perturbation};
}

Outcome Solver::gesvdr(const Array& a_, std::int64_t rank, std::int64_t oversampling,
                       std::int64_t iterations, const Array& left, const Array& values_,
                       const Array& right, const Array& status, std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrix");
  expect_single(a);
  const std::int64_t k = std::min(a.rows, a.columns);
  expect(rank >= 1 && oversampling >= 0 && rank <= k && oversampling <= k - rank,
         "rank = " + std::to_string(rank) + ", oversampling = " + std::to_string(oversampling) +
             ": expected a sum of at most " + std::to_string(k));
  expect(iterations >= 0, "iterations = " + std::to_string(iterations) + ": expected at least 0");
  // The manual gives S, U and V min(m, n) columns, of which the first `rank` are set.
  const auto [u_, v_] = factors(a, left, right);
  const Matrices u = output(*u_, a.transposed ? "right" : "left", a_, 1, a.rows, k);
  const Matrices v = output(*v_, a.transposed ? "left" : "right", a_, 1, a.columns, k);
  char* values = vectors(values_, "values", 'f', a_.itemsize, 1, k);
  const auto type = data_type(a_);

  Call call(*this, "gesvdr", status, 1, stream);
  const auto& f = *library_;
  std::size_t on_device = 0, on_host = 0;
  f.check(f.cusolverDnXgesvdr_bufferSize(handle_, params_, 'S', 'S', a.rows, a.columns, rank,
                                         oversampling, iterations, type, a.data, a.ld, type,
                                         values, type, u.data, u.ld, type, v.data, v.ld, type,
                                         &on_device, &on_host),
          "cusolverDnXgesvdr_bufferSize");
  void *device = device_work(on_device), *host = host_work(on_host);
  f.check(f.cusolverDnXgesvdr(handle_, params_, 'S', 'S', a.rows, a.columns, rank, oversampling,
                              iterations, type, a.data, a.ld, type, values, type, u.data, u.ld,
                              type, v.data, v.ld, type, device, on_device, host, on_host,
                              call.info(0)),
          "cusolverDnXgesvdr");
  return call.settle();
}

Outcome Solver::polar(const Array& a_, const Array& hermitian, const Array& certificate,
                      const Array& status, std::uintptr_t stream) {
  const Matrices a = matrices(a_, "matrix");
  expect_single(a);
  expect(a.rows >= a.columns,
         "polar takes a tall matrix by columns or a wide one by rows, got " +
             std::to_string(a.rows) + " x " + std::to_string(a.columns) + " by columns");
  const Matrices h = output(hermitian, "hermitian", a_, 1, a.columns, a.columns);
  auto* numbers = reinterpret_cast<double*>(vectors(certificate, "certificate", 'f', 8, 1, 3));
  const auto type = data_type(a_);

  Call call(*this, "polar", status, 1, stream);
  const auto& f = *library_;
  std::size_t on_device = 0, on_host = 0;
  f.check(f.cusolverDnXpolar_bufferSize(handle_, params_, CUBLAS_FILL_MODE_FULL, a.rows, a.columns,
                                        type, a.data, a.ld, type, h.data, h.ld, type, &on_device,
                                        &on_host),
          "cusolverDnXpolar_bufferSize");
  void *device = device_work(on_device), *host = host_work(on_host);
  f.check(f.cusolverDnXpolar(handle_, params_, CUBLAS_FILL_MODE_FULL, a.rows, a.columns, type,
                             a.data, a.ld, type, h.data, h.ld, type, device, on_device, host,
                             on_host, numbers, numbers + 1, numbers + 2, call.info(0)),
          "cusolverDnXpolar");
  return call.settle();
}

}  // namespace resm
