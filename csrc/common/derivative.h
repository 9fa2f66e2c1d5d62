// The derivative of an operator as a node of autograd's graph, the way PyTorch makes its own: registered under the
// dispatcher's Autograd key, so that whoever calls the operator gets it, from Python or not. (Both obvious shorter
// ways, torch.library.register_autograd and the C++ torch::autograd::Function, are refused by torch.func.)
//
// A Derivative has
//   static constexpr const char* kName                      as it shows in grad_fn
//   static variable_list backward(grads, saved, wanted)     the gradients of the operator's tensors, in the operators
//                                                           of calls.h, which have derivatives themselves
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace lenet_ext {

using torch::autograd::variable_list;
using Wanted = std::vector<bool>;  // which gradients of the operator's tensors this backward pass needs

// What a derivative keeps from the forward pass. Tensors that are not needed are undefined.
struct Saved {
  variable_list tensors;
  std::vector<c10::SymInt> sizes;
  std::vector<int64_t> options;
};

// PyTorch holds nodes by std::shared_ptr before 2.13, by c10::intrusive_ptr since.
using NodePointer = decltype(std::declval<torch::autograd::Node&>().getptr());

namespace detail {

template <typename T>
void destroy(T* node) {
  deleteNode(node);  // torch::autograd's, which does not recurse through a long graph
}

template <typename T>
auto allocate_node() {
  using Node = torch::autograd::Node;
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T, [](T* node) { destroy<Node>(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace detail

template <typename Derivative>
class DerivativeNode final : public torch::autograd::Node {
 public:
  std::string name() const override { return Derivative::kName; }

  // In the order in which the Derivative reads them; an undefined tensor takes its place.
  void save(const at::Tensor& tensor, bool is_output = false) { tensors_.emplace_back(tensor, is_output); }
  void save(const std::optional<at::Tensor>& tensor) { save(tensor.value_or(at::Tensor())); }
  template <typename Tensor>
  void save_if(bool needed, const Tensor& tensor) {
    needed ? save(tensor) : save(at::Tensor());
  }
  // What only a pass that is differentiated itself reads. Any other gets it for its shape, and it may have changed.
  void save_for_second(const at::Tensor& tensor) {
    for_second_.emplace_back(tensors_.size(), tensor);
    save(tensor);
  }
  void save_sizes(c10::SymIntArrayRef sizes) { sizes_.insert(sizes_.end(), sizes.begin(), sizes.end()); }
  void save_option(int64_t value) { options_.push_back(value); }
  void save_options(at::IntArrayRef values) { options_.insert(options_.end(), values.begin(), values.end()); }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return run(grads, saved(at::GradMode::is_enabled()), wanted());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& tensor : tensors_) tensor.reset_data();
    for_second_.clear();
  }

  // Compiled autograd (torch._dynamo.compiled_autograd): what the graph depends on, and the node as a function of it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(Derivative::kName));
    args.collect(tensors_, true);  // as saved() unpacks them
    args.collect(sizes_);
    args.collect(options_);
    for (size_t i = 0; i < num_outputs(); ++i) args.collect(should_compute_output(i));
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    namespace dynamo = torch::dynamo::autograd;
    swapped.before(tensors_);
    swapped.before(sizes_);
    const Saved kept = saved(true);
    dynamo::PackedArgs packed;
    std::vector<std::optional<at::Tensor>> tensors;
    for (const at::Tensor& tensor : kept.tensors) {
      tensors.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
    }
    packed.pack(tensors);
    packed.pack(kept.sizes);
    packed.pack(kept.options);
    packed.pack(wanted());
    const std::vector<at::IValue> arguments = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const at::IValue& argument : arguments) types.push_back(argument.type());
    const auto& compiler = dynamo::getPyCompilerInterface();
    const std::string function = compiler->bind_function(swapped.get_py_compiler(), name(), &run_packed, types,
                                                         /*is_custom_function=*/true, /*is_traceable=*/true);
    const at::IValue edges = dynamo::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        dynamo::get_input_metadata(next_edges()));
    variable_list results =
        compiler->call_function(swapped.get_py_compiler(), "apply_functional", function, grads, arguments, edges);
    swapped.after(sizes_);
    swapped.after(tensors_);
    return results;
  }

 private:
  static variable_list run(const variable_list& grads, const Saved& saved, const Wanted& wanted) {
    for (const at::Tensor& grad : grads) {
      if (grad.defined()) return Derivative::backward(grads, saved, wanted);
    }
    return variable_list(wanted.size());
  }

  static variable_list run_packed(const variable_list& grads, const std::vector<c10::IValue>& arguments) {
    torch::dynamo::autograd::PackedArgs packed(arguments);
    Saved saved;
    for (auto& tensor : packed.unpack<std::vector<std::optional<at::Tensor>>>()) {
      saved.tensors.push_back(tensor.value_or(at::Tensor()));
    }
    saved.sizes = packed.unpack<std::vector<c10::SymInt>>();
    saved.options = packed.unpack<std::vector<int64_t>>();
    return run(grads, saved, packed.unpack<Wanted>());
  }

  Saved saved(bool for_second) {
    Saved kept{{}, sizes_, options_};
    kept.tensors.reserve(tensors_.size());
    auto unchecked = for_second ? for_second_.end() : for_second_.begin();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const bool here = unchecked != for_second_.end() && unchecked->first == i;
      kept.tensors.push_back(here ? (unchecked++)->second : tensors_[i].unpack(getptr()));
    }
    return kept;
  }

  Wanted wanted() const {
    Wanted wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  std::mutex mutex_;
  std::vector<torch::autograd::SavedVariable> tensors_;
  std::vector<std::pair<size_t, at::Tensor>> for_second_;  // place in tensors_, and the tensor as it is
  std::vector<c10::SymInt> sizes_;
  std::vector<int64_t> options_;
};

// The node of an operator called with these tensors, or null where no gradient of any is wanted. Its caller saves what
// it needs, and calls set_history(output, node) for each output in turn, with an undefined tensor for an output that
// has no gradient.
template <typename Derivative, typename... Tensors>
auto make_node(const Tensors&... inputs) {
  decltype(detail::allocate_node<DerivativeNode<Derivative>>()) node;
  if (torch::autograd::compute_requires_grad(inputs...)) {
    node = detail::allocate_node<DerivativeNode<Derivative>>();
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  }
  return node;
}

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a.add(b);
}

// Forward-mode AD. A tensor's tangent (undefined: it has none), and the tensor without it.
inline at::Tensor tangent(const at::Tensor& tensor) { return tensor.defined() ? tensor._fw_grad(0) : at::Tensor(); }
inline at::Tensor tangent(const std::optional<at::Tensor>& tensor) { return tangent(tensor.value_or(at::Tensor())); }

template <typename... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

inline at::Tensor primal(const at::Tensor& tensor) { return tensor.defined() ? tensor._fw_primal(0) : tensor; }
inline at::Tensor primal(const std::optional<at::Tensor>& tensor) { return primal(tensor.value_or(at::Tensor())); }

inline void set_tangent(const at::Tensor& output, const at::Tensor& tangent) {
  if (tangent.defined() && output.defined()) output._set_fw_grad(tangent, 0, /*is_inplace_op=*/false);
}

}  // namespace lenet_ext
