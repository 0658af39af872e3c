// `group_advantage` from Python: checks every argument, then runs a version of kernels/group_advantage/
// without the GIL. The CPU version also looks at every value before it writes; on a GPU the kernel does.
#include "group_advantage/group_advantage.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace vrthinker {
namespace {

const std::string kOp = "group_advantage";

constexpr double kMinEps = 1e-30;  // with a smaller one a group of almost equal rewards could overflow

[[noreturn]] void refuse(const std::string& argument, const std::string& got, const std::string& wanted) {
    throw py::value_error(kOp + ": " + argument + ": got " + got + ", wanted " + wanted);
}

// As Python prints a float.
std::string number(double value) {
    return py::repr(py::float_(value)).cast<std::string>();
}

AdvantageMethod method_of(const std::string& name) {
    constexpr std::array names{"grpo", "dr_grpo", "rloo", "batch_std", "reinforce_plus_plus"};
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (name == names[i]) {
            return static_cast<AdvantageMethod>(i);
        }
    }
    refuse("method", "'" + name + "'", "grpo, dr_grpo, rloo, batch_std or reinforce_plus_plus");
}

struct Options {
    AdvantageMethod method;
    std::int32_t ddof;
    double eps;

    Options(const std::string& method_name, std::int64_t ddof_value, double eps_value)
        : method(method_of(method_name)), ddof(static_cast<std::int32_t>(ddof_value)), eps(eps_value) {
        if (ddof_value != 0 && ddof_value != 1) {
            refuse("ddof", std::to_string(ddof_value), "0 or 1");
        }
        if (!(eps >= kMinEps && std::isfinite(eps))) {
            refuse("eps", number(eps), "a finite number of at least 1e-30");
        }
    }
};

std::optional<TensorView> view(const py::object& tensor, const char* argument) {
    return tensor.is_none() ? std::nullopt : std::optional<TensorView>(std::in_place, tensor, kOp, argument);
}

template <typename Value>
Strided<Value> strided(const TensorView& tensor) {
    return {static_cast<const Value*>(tensor.data()), tensor.strides()[0]};
}

// Every tensor of a call, checked. `status` is None on the CPU.
class Call {
  public:
    Call(const py::object& rewards_object, const py::object& offsets_object, const py::object& valid_object,
         const py::object& token_offsets_object, const py::object& advantages_object,
         const py::object& zero_variance_object, const py::object& status_object, dlpack::DeviceType device)
        : rewards(rewards_object, kOp, "rewards"),
          group_offsets(offsets_object, kOp, "group_offsets"),
          advantages(advantages_object, kOp, "advantages"),
          zero_variance(zero_variance_object, kOp, "zero_variance"),
          valid(view(valid_object, "valid")),
          token_offsets(view(token_offsets_object, "token_offsets")),
          status(view(status_object, "status")) {
        is_double_ = rewards.dtype().code == dlpack::kFloat && rewards.dtype().bits == 64;
        if (!is_double_) {
            if (rewards.dtype().code != dlpack::kFloat || rewards.dtype().bits != 32) {
                rewards.fail("dtype " + dtype_name(rewards.dtype().code, rewards.dtype().bits),
                             "float32 or float64");
            }
        }
        rewards.require_device(device);
        rewards.require_rank(1, "[episodes]");
        episodes_ = rewards.shape()[0];
        check(group_offsets, dlpack::kInt, 64);
        group_offsets.require_rank(1, "[groups + 1]");
        groups_ = group_offsets.shape()[0] - 1;
        if (groups_ < (episodes_ > 0 ? 1 : 0)) {
            group_offsets.fail(
                "shape " + shape_name(group_offsets.shape()),
                "[groups + 1] with at least one group for " + std::to_string(episodes_) + " episodes");
        }
        if (valid) {
            check(*valid, dlpack::kBool, 8);
            valid->require_shape({episodes_});
        }
        if (token_offsets) {
            check(*token_offsets, dlpack::kInt, 64);
            token_offsets->require_shape({episodes_ + 1});
        }
        check_output(advantages, dlpack::kFloat, rewards.dtype().bits);
        advantages.require_rank(1, token_offsets ? "[n_tokens]" : "[episodes]");
        if (!token_offsets) {
            advantages.require_shape({episodes_});
        }
        check_output(zero_variance, dlpack::kBool, 8);
        zero_variance.require_shape({groups_});
        if (status) {
            check_output(*status, dlpack::kInt, 32);
            status->require_shape({1});
        }
    }

    // Calls run(task) with the task in the rewards' type.
    template <typename Run>
    void dispatch(const Options& options, const Run& run) const {
        if (is_double_) {
            run(task<double>(options));
        } else {
            run(task<float>(options));
        }
    }

    int device_index() const { return rewards.device().id; }

  private:
    void check(const TensorView& tensor, std::uint8_t code, std::uint8_t bits) const {
        tensor.require_dtype(code, bits);
        if (tensor.device().type != rewards.device().type || tensor.device().id != rewards.device().id) {
            tensor.fail("a tensor on " + device_name(tensor.device()),
                        "the rewards' device, " + device_name(rewards.device()));
        }
    }
    void check_output(const TensorView& tensor, std::uint8_t code, std::uint8_t bits) const {
        check(tensor, code, bits);
        tensor.require_contiguous();
        tensor.require_writable();
    }

    template <typename Real>
    AdvantageTask<Real> task(const Options& options) const {
        AdvantageTask<Real> result;
        result.rewards = strided<Real>(rewards);
        result.group_offsets = strided<std::int64_t>(group_offsets);
        if (valid) {
            result.valid = strided<std::uint8_t>(*valid);
        }
        if (token_offsets) {
            result.token_offsets = strided<std::int64_t>(*token_offsets);
            result.n_tokens = advantages.shape()[0];
        }
        result.episodes = episodes_;
        result.groups = groups_;
        result.method = options.method;
        result.ddof = options.ddof;
        result.eps = options.eps;
        result.advantages = static_cast<Real*>(advantages.data());
        result.zero_variance = static_cast<std::uint8_t*>(zero_variance.data());
        result.status = status ? static_cast<std::int32_t*>(status->data()) : nullptr;
        return result;
    }

    TensorView rewards;
    TensorView group_offsets;
    TensorView advantages;
    TensorView zero_variance;
    std::optional<TensorView> valid;
    std::optional<TensorView> token_offsets;
    std::optional<TensorView> status;
    bool is_double_ = false;
    std::int64_t episodes_ = 0;
    std::int64_t groups_ = 0;
};

template <typename Real>
[[noreturn]] void refuse_value(const AdvantageTask<Real>& task, const AdvantageProblem& problem) {
    const std::string at = "[" + std::to_string(problem.index) + "]";
    const std::string offset = std::to_string(problem.offset);
    switch (problem.kind) {
        case AdvantageProblem::Kind::kGroupOffset:
            refuse("group_offsets" + at, offset,
                   "offsets that ascend from 0 to " + std::to_string(task.episodes) + ", the episodes");
        case AdvantageProblem::Kind::kTokenOffset:
            refuse("token_offsets" + at, offset,
                   "offsets that ascend within 0 to " + std::to_string(task.n_tokens) + ", n_tokens");
        default:
            refuse("rewards" + at, number(problem.reward),
                   "a number within -1e38 to 1e38 in every valid episode (mark the others in `valid`)");
    }
}

void run_cpu(const py::object& rewards, const py::object& group_offsets, const py::object& valid,
             const py::object& token_offsets, const py::object& advantages, const py::object& zero_variance,
             const std::string& method, std::int64_t ddof, double eps, int num_threads) {
    const Options options(method, ddof, eps);
    if (num_threads < 1) {
        refuse("num_threads", std::to_string(num_threads), "1 or more");
    }
    const Call call(rewards, group_offsets, valid, token_offsets, advantages, zero_variance, py::none(),
                    dlpack::kCpu);
    call.dispatch(options, [&](const auto& task) {
        std::optional<AdvantageProblem> problem;
        {
            const py::gil_scoped_release release;
            problem = find_problem(task);
            if (!problem) {
                group_advantage_cpu(task, num_threads);
            }
        }
        if (problem) {
            refuse_value(task, *problem);
        }
    });
}

#ifdef VRTHINKER_WITH_CUDA
void run_cuda(const py::object& rewards, const py::object& group_offsets, const py::object& valid,
              const py::object& token_offsets, const py::object& advantages, const py::object& zero_variance,
              const py::object& status, const std::string& method, std::int64_t ddof, double eps,
              std::uintptr_t stream) {
    const Options options(method, ddof, eps);
    if (status.is_none()) {
        refuse("status", "None", "int32 [1]");
    }
    const Call call(rewards, group_offsets, valid, token_offsets, advantages, zero_variance, status,
                    dlpack::kCuda);
    const char* error = nullptr;
    call.dispatch(options, [&](const auto& task) {
        const py::gil_scoped_release release;
        error = group_advantage_cuda(task, call.device_index(), stream);
    });
    if (error) {
        throw std::runtime_error(kOp + ": CUDA: " + error);
    }
}
#endif

}  // namespace

void bind_group_advantage(py::module_& module) {
    module.def("group_advantage_cpu", &run_cpu, py::arg("rewards"), py::arg("group_offsets"),
               py::arg("valid"), py::arg("token_offsets"), py::arg("advantages"), py::arg("zero_variance"),
               py::arg("method"), py::arg("ddof"), py::arg("eps"), py::arg("num_threads"),
               "Fills `advantages` and `zero_variance`, all on the CPU; raises on bad values.");
#ifdef VRTHINKER_WITH_CUDA
    module.def("group_advantage_cuda", &run_cuda, py::arg("rewards"), py::arg("group_offsets"),
               py::arg("valid"), py::arg("token_offsets"), py::arg("advantages"), py::arg("zero_variance"),
               py::arg("status"), py::arg("method"), py::arg("ddof"), py::arg("eps"), py::arg("stream"),
               "Queues `group_advantage` of CUDA tensors on a raw stream; counts bad values in `status`.");
#endif
}

}  // namespace vrthinker
