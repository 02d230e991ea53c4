// Device arrays as pointer, shape and strides, and how cuSOLVER reads them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace resm {

// A tensor's memory. Whoever makes one keeps the memory alive.
class Array {
 public:
  // kind: "f4", "f8" or "i4". Strides count elements. std::invalid_argument where they cannot be.
  Array(std::uintptr_t pointer, const std::string& kind, std::vector<std::int64_t> shape,
        std::vector<std::int64_t> strides);

  char* data;
  char type;  // 'f' or 'i'
  int itemsize;
  std::vector<std::int64_t> shape, strides;
};

// A batch of matrices as cuSOLVER sees it: column-major. A row-major array is read as its
// transpose, so `rows` and `columns` are then exchanged and nothing is copied.
struct Matrices {
  char* data;
  std::int64_t batch, rows, columns, ld, step;
  bool transposed;
};

// 2-D or 3-D; `name` is for the error.
Matrices matrices(const Array& array, const char* name);
// An output: column-major batch x rows x columns of the same dtype.
Matrices output(const Array& array, const char* name, const Array& like, std::int64_t batch,
                std::int64_t rows, std::int64_t columns);
// An output: contiguous batch x count of the given kind.
char* vectors(const Array& array, const char* name, char type, int itemsize, std::int64_t batch,
              std::int64_t count);
void expect(bool holds, const std::string& what);
int as_int(std::int64_t value, const char* name);
// The most matrices per call so that no array of a call has more bytes than int32 counts, which
// is what JAX keeps XsyevBatched to; a single matrix may, up to int32 elements.
std::int64_t batch_per_call(std::int64_t batch, const std::vector<std::int64_t>& steps,
                            std::int64_t itemsize);

}  // namespace resm
