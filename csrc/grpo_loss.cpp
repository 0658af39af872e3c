// `grpo_loss` from Python: checks every argument, then runs a version of kernels/grpo_loss/ without the GIL.
#include "grpo_loss/grpo_loss.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

constexpr const char* kOp = "grpo_loss";

[[noreturn]] void refuse(const char* argument, const std::string& got, const char* wanted) {
    throw py::value_error(std::string(kOp) + ": " + argument + ": got " + got + ", wanted " + wanted);
}

Aggregation aggregation_of(const std::string& name) {
    if (name == "token_mean") {
        return Aggregation::kTokenMean;
    }
    if (name == "episode_mean") {
        return Aggregation::kEpisodeMean;
    }
    if (name == "fixed_length") {
        return Aggregation::kFixedLength;
    }
    refuse("aggregation", "'" + name + "'", "token_mean, episode_mean or fixed_length");
}

LogprobType logprob_type(const TensorView& view) {
    const auto type = view.dtype();
    if (type.code == dlpack::kFloat && type.bits == 32) {
        return LogprobType::kFloat32;
    }
    if (type.code == dlpack::kBfloat && type.bits == 16) {
        return LogprobType::kBFloat16;
    }
    if (type.code == dlpack::kFloat && type.bits == 16) {
        return LogprobType::kFloat16;
    }
    view.fail("dtype " + dtype_name(type.code, type.bits), "float32, bfloat16 or float16");
}

// What every version gets, checked.
struct Call {
    Call(const py::object& policy_object, const py::object& old_object, const py::object& ref_object,
         const py::object& advantages_object, const py::object& mask_object, const py::object& offsets_object,
         const py::object& loss_object, const py::object& token_loss_object,
         const py::object& gradient_object, const py::object& scale_object, const py::object& metrics_object,
         double lowest_ratio, double highest_ratio, double kl_weight, const std::string& aggregation,
         std::int64_t fixed_length, double normalizer, dlpack::DeviceType device_type)
        : policy(policy_object, kOp, "policy_logprobs"),
          old_policy(old_object, kOp, "old_logprobs"),
          reference(ref_object.is_none() ? policy_object : ref_object, kOp, "ref_logprobs"),
          advantages(advantages_object, kOp, "advantages"),
          mask(mask_object, kOp, "loss_mask"),
          offsets(offsets_object, kOp, "episode_offsets"),
          loss(loss_object, kOp, "loss"),
          token_loss(token_loss_object, kOp, "token_loss"),
          gradient(gradient_object, kOp, "gradient"),
          scale(scale_object, kOp, "scale"),
          metrics(metrics_object, kOp, "metrics") {
        for (const TensorView* view : {&policy, &old_policy, &reference, &advantages, &mask, &offsets, &loss,
                                       &token_loss, &gradient, &scale, &metrics}) {
            view->require_device(device_type);
            if (view->device().id != policy.device().id) {
                view->fail("one on " + device_name(view->device()),
                           "one on " + device_name(policy.device()) + ", as policy_logprobs");
            }
        }
        check_inputs();
        in.policy = logprobs(policy);
        in.old_policy = logprobs(old_policy);
        in.reference =
            ref_object.is_none() ? Logprobs{nullptr, 0, LogprobType::kFloat32} : logprobs(reference);
        check_outputs();
        if (!(lowest_ratio >= 0.0 && lowest_ratio <= highest_ratio && std::isfinite(highest_ratio))) {
            refuse("lowest_ratio and highest_ratio",
                   std::to_string(lowest_ratio) + " and " + std::to_string(highest_ratio),
                   "0 <= lowest_ratio <= highest_ratio, finite");
        }
        if (!std::isfinite(kl_weight)) {
            refuse("kl_weight", std::to_string(kl_weight), "a finite number");
        }
        in.clip = {static_cast<float>(lowest_ratio), static_cast<float>(highest_ratio),
                   static_cast<float>(kl_weight)};
        in.aggregation = aggregation_of(aggregation);
        if (in.aggregation == Aggregation::kFixedLength && fixed_length < 1) {
            refuse("fixed_length", std::to_string(fixed_length), "1 or more");
        }
        in.fixed_length = static_cast<double>(fixed_length);
        if (!(normalizer >= 0.0) || !std::isfinite(normalizer)) {
            refuse("normalizer", std::to_string(normalizer), "a finite number above 0, or 0 for none");
        }
        in.normalizer = normalizer;
    }

    // On a CPU only: elsewhere the offsets can't be read without waiting for the device.
    void check_offsets() const {
        const auto at = [&](std::int64_t i) { return in.offsets[i * in.offset_stride]; };
        if (at(0) != 0) {
            offsets.fail("a first offset of " + std::to_string(at(0)), "0");
        }
        for (std::int64_t i = 0; i < in.episodes; ++i) {
            if (at(i + 1) < at(i)) {
                offsets.fail(std::to_string(at(i + 1)) + " after " + std::to_string(at(i)),
                             "ascending offsets");
            }
        }
        if (at(in.episodes) != in.tokens) {
            offsets.fail("a last offset of " + std::to_string(at(in.episodes)),
                         std::to_string(in.tokens) + ", the number of tokens");
        }
    }

    TensorView policy;
    TensorView old_policy;
    TensorView reference;
    TensorView advantages;
    TensorView mask;
    TensorView offsets;
    TensorView loss;
    TensorView token_loss;
    TensorView gradient;
    TensorView scale;
    TensorView metrics;
    GrpoInput in{};
    GrpoOutput out{};

  private:
    static Logprobs logprobs(const TensorView& view) {
        return {view.data(), view.strides()[0], logprob_type(view)};
    }

    void check_inputs() {
        policy.require_rank(1, "[tokens]");
        in.tokens = policy.shape()[0];
        for (const TensorView* view : {&old_policy, &reference, &mask}) {
            view->require_shape({in.tokens});
        }
        mask.require_dtype(dlpack::kBool, 8);
        in.mask = static_cast<const std::uint8_t*>(mask.data());
        in.mask_stride = mask.strides()[0];
        offsets.require_dtype(dlpack::kInt, 64);
        offsets.require_rank(1, "[episodes + 1]");
        if (offsets.shape()[0] < 1) {
            offsets.fail("no offsets", "[episodes + 1]");
        }
        in.episodes = offsets.shape()[0] - 1;
        if (in.episodes == 0 && in.tokens > 0) {
            offsets.fail("no episodes for " + std::to_string(in.tokens) + " tokens", "one or more");
        }
        in.offsets = static_cast<const std::int64_t*>(offsets.data());
        in.offset_stride = offsets.strides()[0];
        advantages.require_dtype(dlpack::kFloat, 32);
        advantages.require_rank(1, "[tokens] or [episodes]");
        const std::int64_t count = advantages.shape()[0];
        if (count != in.tokens && count != in.episodes) {
            advantages.fail("shape " + shape_name(advantages.shape()),
                            "[" + std::to_string(in.tokens) + "] (tokens) or [" +
                                std::to_string(in.episodes) + "] (episodes)");
        }
        in.advantage_per_episode = count != in.tokens;
        in.advantages = static_cast<const float*>(advantages.data());
        in.advantage_stride = advantages.strides()[0];
    }

    float* output(const TensorView& view, const std::vector<std::int64_t>& shape) const {
        view.require_dtype(dlpack::kFloat, 32);
        view.require_shape(shape);
        view.require_contiguous();
        view.require_writable();
        return static_cast<float*>(view.data());
    }

    void check_outputs() {
        out.loss = output(loss, {});
        out.token_loss = output(token_loss, {in.tokens});
        out.gradient = output(gradient, {in.tokens});
        out.scale = output(scale, {});
        out.metrics = output(metrics, {kGrpoMetrics});
    }
};

void run_cpu(const py::object& policy, const py::object& old_policy, const py::object& reference,
             const py::object& advantages, const py::object& mask, const py::object& offsets,
             const py::object& loss, const py::object& token_loss, const py::object& gradient,
             const py::object& scale, const py::object& metrics, double lowest_ratio, double highest_ratio,
             double kl_weight, const std::string& aggregation, std::int64_t fixed_length, double normalizer,
             int num_threads) {
    const Call call(policy, old_policy, reference, advantages, mask, offsets, loss, token_loss, gradient,
                    scale, metrics, lowest_ratio, highest_ratio, kl_weight, aggregation, fixed_length,
                    normalizer, dlpack::kCpu);
    call.check_offsets();
    if (num_threads < 1) {
        refuse("num_threads", std::to_string(num_threads), "1 or more");
    }
    const py::gil_scoped_release release;
    grpo_loss_cpu(call.in, call.out, num_threads);
}

#ifdef VRTHINKER_WITH_CUDA
void run_cuda(const py::object& policy, const py::object& old_policy, const py::object& reference,
              const py::object& advantages, const py::object& mask, const py::object& offsets,
              const py::object& loss, const py::object& token_loss, const py::object& gradient,
              const py::object& scale, const py::object& metrics, double lowest_ratio, double highest_ratio,
              double kl_weight, const std::string& aggregation, std::int64_t fixed_length, double normalizer,
              const py::object& workspace_object, std::uintptr_t stream) {
    const Call call(policy, old_policy, reference, advantages, mask, offsets, loss, token_loss, gradient,
                    scale, metrics, lowest_ratio, highest_ratio, kl_weight, aggregation, fixed_length,
                    normalizer, dlpack::kCuda);
    const TensorView workspace(workspace_object, kOp, "workspace");
    workspace.require_device(dlpack::kCuda);
    workspace.require_dtype(dlpack::kUInt, 8);
    workspace.require_contiguous();
    workspace.require_writable();
    const std::int64_t wanted = grpo_workspace_bytes(call.in.tokens, call.in.episodes);
    if (workspace.device().id != call.policy.device().id || workspace.element_count() < wanted ||
        reinterpret_cast<std::uintptr_t>(workspace.data()) % 8 != 0) {
        workspace.fail(
            std::to_string(workspace.element_count()) + " bytes on " + device_name(workspace.device()),
            std::to_string(wanted) + " aligned bytes on the tensors' device");
    }
    const char* error = nullptr;
    {
        const py::gil_scoped_release release;
        error = grpo_loss_cuda(call.in, call.out, workspace.data(), call.policy.device().id, stream);
    }
    if (error) {
        throw std::runtime_error(std::string(kOp) + ": CUDA: " + error);
    }
}
#endif

}  // namespace

void bind_grpo_loss(py::module_& module) {
    module.def("grpo_loss_cpu", &run_cpu, py::arg("policy_logprobs"), py::arg("old_logprobs"),
               py::arg("ref_logprobs").none(true), py::arg("advantages"), py::arg("loss_mask"),
               py::arg("episode_offsets"), py::arg("loss"), py::arg("token_loss"), py::arg("gradient"),
               py::arg("scale"), py::arg("metrics"), py::arg("lowest_ratio"), py::arg("highest_ratio"),
               py::arg("kl_weight"), py::arg("aggregation"), py::arg("fixed_length"), py::arg("normalizer"),
               py::arg("num_threads"),
               "Fills loss, token_loss, gradient, scale and metrics from tensors on the CPU.");
    module.def("grpo_loss_workspace_bytes", &grpo_workspace_bytes, py::arg("tokens"), py::arg("episodes"),
               "Bytes of scratch memory that `grpo_loss_cuda` wants.");
#ifdef VRTHINKER_WITH_CUDA
    module.def("grpo_loss_cuda", &run_cuda, py::arg("policy_logprobs"), py::arg("old_logprobs"),
               py::arg("ref_logprobs").none(true), py::arg("advantages"), py::arg("loss_mask"),
               py::arg("episode_offsets"), py::arg("loss"), py::arg("token_loss"), py::arg("gradient"),
               py::arg("scale"), py::arg("metrics"), py::arg("lowest_ratio"), py::arg("highest_ratio"),
               py::arg("kl_weight"), py::arg("aggregation"), py::arg("fixed_length"), py::arg("normalizer"),
               py::arg("workspace"), py::arg("stream"),
               "Queues `grpo_loss` of CUDA tensors on a raw stream: two kernels, no synchronisation.");
#endif
}

}  // namespace vrthinker
