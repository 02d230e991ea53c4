// resm_kernels._cusolver: see resm_kernels/linalg/cusolver.py for the Python face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "array.h"
#include "library.h"
#include "solver.h"

namespace py = pybind11;
using namespace py::literals;
using resm::Array;
using resm::Library;
using resm::Outcome;
using resm::Solver;

PYBIND11_MODULE(_cusolver, module) {
  module.doc() = "cuSOLVER's dense solvers on device pointers; the libraries are found at run time.";
  py::register_exception<resm::CusolverError>(module, "CusolverError", PyExc_RuntimeError);

  py::class_<Array>(module, "Array")
      .def(py::init<std::uintptr_t, const std::string&, std::vector<std::int64_t>,
                    std::vector<std::int64_t>>(),
           "pointer"_a, "kind"_a, "shape"_a, "strides"_a);

  py::class_<Outcome>(module, "Outcome")
      .def_readonly("failed", &Outcome::failed)
      .def_readonly("nonfinite", &Outcome::nonfinite);

  py::class_<Library, std::shared_ptr<Library>>(module, "Library")
      .def(py::init<const std::vector<std::string>&, const std::vector<std::string>&>(),
           "solver"_a, "runtime"_a)
      .def("missing", &Library::missing)
      .def("version", &Library::version)
      .def("solver_path", &Library::solver_path)
      .def("runtime_path", &Library::runtime_path);

  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Solver>(module, "Solver")
      .def(py::init<std::shared_ptr<Library>, int, py::function>(), "library"_a, "device"_a,
           "allocate"_a)
      .def("gesvdj_batched", &Solver::gesvdj_batched, unlocked, "matrices"_a, "left"_a,
           "values"_a, "right"_a, "status"_a, "stream"_a)
      .def("gesvda_batched", &Solver::gesvda_batched, unlocked, "matrices"_a, "rank"_a, "left"_a,
           "values"_a, "right"_a, "status"_a, "stream"_a)
      .def("syev_batched", &Solver::syev_batched, unlocked, "matrices"_a, "values"_a, "status"_a,
           "stream"_a)
      .def("syevd", &Solver::syevd, unlocked, "matrix"_a, "values"_a, "status"_a, "stream"_a)
      .def("syevdx", &Solver::syevdx, unlocked, "matrix"_a, "count"_a, "values"_a, "status"_a,
           "stream"_a)
      .def("gesvdp", &Solver::gesvdp, unlocked, "matrix"_a, "left"_a, "values"_a, "right"_a,
           "status"_a, "stream"_a)
      .def("gesvdr", &Solver::gesvdr, unlocked, "matrix"_a, "rank"_a, "oversampling"_a,
           "iterations"_a, "left"_a, "values"_a, "right"_a, "status"_a, "stream"_a)
      .def("polar", &Solver::polar, unlocked, "matrix"_a, "hermitian"_a, "certificate"_a,
           "status"_a, "stream"_a)
      .def("release", &Solver::release)
      .def_property_readonly("device_bytes", &Solver::device_bytes)
      .def_property_readonly("host_bytes", &Solver::host_bytes);
}
