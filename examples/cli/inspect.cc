// dsv3 inspect FILE: what is in a .dsv3 file and what running it needs.
#include <memory>

#include "commands.h"
#include "common.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  bool verify = false, json = false, tensors = false;
};

Json model_json(const dsv3_model* model) {
  uint64_t needed = 0;
  call([&](dsv3_error** e) { return dsv3_model_get_json(model, nullptr, 0, &needed, e); });
  std::string text(needed + 1, '\0');
  call([&](dsv3_error** e) {
    return dsv3_model_get_json(model, text.data(), text.size(), &needed, e);
  });
  text.resize(needed);
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    throw Failure(std::string("the library's description of the model is not JSON: ") +
                  error.what());
  }
}

std::string hexadecimal(const uint8_t* bytes, size_t count) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += format("%02x", bytes[i]);
  return out;
}

std::string token_name(const dsv3_model* model, int32_t id) {
  if (id < 0) return "none";
  return format("%d %s", id, detokenize(model, &id, 1, 0).c_str());
}

void print_human(const dsv3_model* model, const dsv3_memory_estimate& memory) {
  const dsv3_model_info info = model_info(model);
  std::string out;
  const auto row = [&](const char* name, const std::string& value) {
    out += format("%-18s %s\n", name, value.c_str());
  };
  row("file", format("%s (%s)", info.path, human_bytes(info.file_bytes).c_str()));
  row("model", info.model_type);
  row("parameters", human_count(info.parameters));
  row("weights", format("%s, of which one token reads %s", human_bytes(info.weight_bytes).c_str(),
                        human_bytes(info.active_bytes_per_token).c_str()));
  row("layers", format("%d, hidden size %d, MTP modules %d", info.num_hidden_layers,
                       info.hidden_size, info.num_nextn_predict_layers));
  row("experts", info.n_routed_experts == 0
                     ? std::string("none (dense)")
                     : format("%d, %d per token", info.n_routed_experts, info.num_experts_per_tok));
  row("latent",
      format("%d + %d values per token and layer", info.kv_lora_rank, info.qk_rope_head_dim));
  row("vocabulary", human_count(static_cast<uint64_t>(info.vocab_size)));
  row("longest sequence",
      human_count(static_cast<uint64_t>(info.max_position_embeddings)) + " tokens");
  if (info.has_tokenizer != 0) {
    row("begin, end",
        token_name(model, info.bos_token_id) + ", " + token_name(model, info.eos_token_id));
  }
  row("tokenizer", info.has_tokenizer != 0 ? "yes" : "no");
  row("chat template", info.chat_template);
  row("fill in the middle", info.has_fim != 0 ? "yes" : "no");
  row("fingerprint", hexadecimal(info.fingerprint, sizeof info.fingerprint));
  row("memory to run",
      format("%s: weights %s, cache %s (%s tokens), scratch %s",
             human_bytes(memory.total_bytes).c_str(), human_bytes(memory.weight_bytes).c_str(),
             human_bytes(memory.cache_bytes).c_str(), human_count(memory.cache_tokens).c_str(),
             human_bytes(memory.scratch_bytes).c_str()));
  if (memory.machine_bytes != 0) row("this machine", human_bytes(memory.machine_bytes));
  write_out(out);
}

void print_tensors(const Json& description) {
  if (!description.contains("tensors")) return;
  std::string out;
  for (const Json& tensor : description["tensors"]) {
    out += format("%-64s %-8s %-20s %s\n", tensor.value("name", "").c_str(),
                  tensor.value("dtype", "").c_str(),
                  tensor.contains("shape") ? tensor["shape"].dump().c_str() : "",
                  tensor.contains("bytes") ? tensor["bytes"].dump().c_str() : "");
  }
  write_out(out);
}

void run(const Options& o, Main& main) {
  main.json = o.json;
  Interrupt interrupt;
  const Model model = o.model.open(interrupt);
  const dsv3_context_options context = o.context.make();
  dsv3_memory_estimate memory = {};
  memory.struct_size = sizeof memory;
  call([&](dsv3_error** e) {
    return dsv3_estimate_memory(o.model.file.c_str(), &context, &memory, e);
  });
  if (!o.json) {
    print_human(model.get(), memory);
    if (o.tensors) print_tensors(model_json(model.get()));
  }
  if (o.verify) {
    Progress progress("verifying", Progress::Unit::kBytes);
    call([&](dsv3_error** e) {
      return dsv3_model_verify(model.get(), Progress::callback, &progress, interrupt.token(), e);
    });
  }
  if (!o.json) {
    if (o.verify) write_out("checksums          all match\n");
    return;
  }
  Json out = model_json(model.get());
  out["memory"] = {{"weight_bytes", memory.weight_bytes}, {"cache_bytes", memory.cache_bytes},
                   {"cache_tokens", memory.cache_tokens}, {"scratch_bytes", memory.scratch_bytes},
                   {"total_bytes", memory.total_bytes},   {"machine_bytes", memory.machine_bytes}};
  if (o.verify) out["verified"] = true;
  write_json(out);
}

}  // namespace

void add_inspect(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand("inspect", "Show what a .dsv3 file holds");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  o->context.add_to(*command);
  command->add_flag(
      "--verify", o->verify,
      "read the whole file: compare every checksum, find weights that are not finite");
  command->add_flag("--tensors", o->tensors, "list every tensor");
  command->add_flag("--json", o->json, "print everything as JSON (tensors included)");
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
