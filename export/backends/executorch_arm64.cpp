// ExecuTorch behind functions of C, for worker.py where there is no PyTorch, which ExecuTorch's own binding needs.
//
// A function that can fail returns a line that says why, or nullptr. Outputs stay until the program runs again.
// Nothing is freed: the worker has one program, and ends with it.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

struct Program {
    explicit Program(const char* path) : module(path) {}

    Module module;
    std::vector<EValue> outputs;
};

const char* message(Error error) { return error == Error::Ok ? nullptr : executorch::runtime::to_string(error); }

}  // namespace

extern "C" {

// Opens the program of a file, and loads its weights.
const char* program_open(const char* path, Program** opened) {
    *opened = new Program(path);
    return message((*opened)->module.load_forward());
}

// Runs one image, of float32 or of uint8.
const char* program_run(Program* program, void* image, bool is_uint8, int dims, const std::int32_t* sizes) {
    const auto type = is_uint8 ? ScalarType::Byte : ScalarType::Float;
    auto input = executorch::extension::from_blob(image, std::vector<SizesType>(sizes, sizes + dims), type);
    auto outputs = program->module.forward(input);
    if (!outputs.ok()) return message(outputs.error());
    program->outputs = std::move(*outputs);
    for (const auto& each : program->outputs)
        if (!each.isTensor() || each.toTensor().scalar_type() != ScalarType::Float) return "outputs are not float32";
    return nullptr;
}

int program_outputs(const Program* program) { return static_cast<int>(program->outputs.size()); }

int output_dims(const Program* program, int number) { return program->outputs[number].toTensor().dim(); }

const std::int32_t* output_sizes(const Program* program, int number) {
    return program->outputs[number].toTensor().sizes().data();
}

const float* output_values(const Program* program, int number) {
    return program->outputs[number].toTensor().const_data_ptr<float>();
}

}  // extern "C"
