// dsv3 purge-cache DIR: removes the prefixes that --disk-cache left in a directory.
#include <memory>

#include "commands.h"
#include "common.h"

namespace cli {

void add_purge_cache(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand(
      "purge-cache", "Remove the prefixes that --disk-cache keeps in a directory");
  struct Options {
    std::string path;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  command->add_option("DIR", o->path, "the directory")->required();
  command->add_flag("--json", o->json, "print one JSON object");
  command->callback([o, &main] {
    main.json = o->json;
    uint64_t bytes = 0;
    call([&](dsv3_error** e) { return dsv3_disk_cache_purge(o->path.c_str(), &bytes, e); });
    if (o->json) {
      write_json({{"bytes", bytes}});
    } else {
      write_out(format("%s: removed %s\n", o->path.c_str(), human_bytes(bytes).c_str()));
    }
  });
}

}  // namespace cli
