// How a call of mla_attention() is cut into tasks: which rows are absorbed and projected together,
// whether keys are shared out by splits, and how many heads a task takes. None of it changes a bit.
#include <algorithm>

#include "kernels/cpu/attention_job.h"

namespace dsv3::kernels {
namespace {

constexpr size_t kWorthSharing = size_t{512} << 10;  // bytes of W_UK and W_UV
size_t bytes_of(const Matrix& w) { return matrix_bytes(w.dtype, w.layout, w.n, w.k); }

}  // namespace

AttentionJob::Part AttentionJob::part_of(int64_t index) const {
  const int32_t all_heads = args->shape.heads;
  int32_t before = 0;
  for (const SequenceRows& seq : args->sequences) {
    const bool is_shared = shares(seq, before);
    const int64_t count = tasks_of(seq, is_shared);
    if (index >= count) {
      index -= count;
      before += is_shared ? seq.rows : 0;
      continue;
    }
    const auto block = static_cast<int32_t>(index / head_blocks(is_shared));
    const auto head_block = static_cast<int32_t>(index % head_blocks(is_shared));
    if (by_splits && is_shared) {  // all of its rows
      const int32_t head = head_block * shared_head_step;
      const int32_t heads = std::min(shared_head_step, all_heads - head);
      return {{&seq, 0, seq.rows, head, heads, before}, first_split() + block};
    }
    // Later rows have more keys: they come first, so that the last tasks are short.
    const int32_t blocks = (seq.rows + row_step - 1) / row_step;
    const int32_t begin = (blocks - 1 - block) * row_step;
    const int32_t head = head_block * head_step;
    return {{&seq, begin, std::min(seq.rows, begin + row_step), head,
             std::min(head_step, all_heads - head), is_shared ? before : -1},
            -1};
  }
  return {{}, -1};
}

void AttentionJob::attend_task(void* context, int index, int worker) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  const Part part = job.part_of(index);
  // Threads that are as fast as each other take turns.
  PagesAhead after;
  if (const int64_t next = index + job.device->threads(); next < job.attend_tasks) {
    const Part then = job.part_of(next);
    after = job.pages_at(then.block, split_begin(then.split < 0 ? job.first_split() : then.split));
  }
  if (part.split < 0) {
    job.attend(part.block, after, worker);
  } else {
    job.attend_split(part.block, part.split, after, worker);
  }
}

// Lists the rows that may be absorbed and projected together, with their splits. Returns of how
// many sequences.
size_t AttentionJob::share_rows() {
  size_t sequences = 0;
  int32_t* first_part = device->attention_first_part_.get();
  first_part[0] = 0;
  for (const SequenceRows& seq : args->sequences) {
    if (!shares(seq, shared_rows)) continue;
    ++sequences;
    for (int32_t r = 0; r < seq.rows; ++r) {
      const int64_t split = split_of(seq.first_position + r);
      device->attention_rows_[static_cast<size_t>(shared_rows)] = seq.row_begin + r;
      // More than there is room for are as many as just one more.
      first_part[shared_rows + 1] = static_cast<int32_t>(
          std::min(first_part[shared_rows] + split + 1 - first_split(), kSplitParts + 1));
      ++shared_rows;
    }
  }
  return sequences;
}

// Has one of these rows more than one split, and is there room for the parts of all?
bool AttentionJob::has_long_shared() const {
  const int64_t parts = device->attention_first_part_[static_cast<size_t>(shared_rows)];
  return parts > shared_rows && parts * args->shape.heads <= kSplitParts;
}

// Tasks of the phase that attends.
int64_t AttentionJob::tasks() const {
  int32_t shared = 0;
  int64_t count = 0;
  for (const SequenceRows& seq : args->sequences) {
    const bool is_shared = shares(seq, shared);
    shared += is_shared ? seq.rows : 0;
    count += tasks_of(seq, is_shared);
  }
  return count;
}

// Rows in equal blocks, and in more of them where that leaves no thread without work while others
// still have some: 44 rows in blocks of 32 and 12 would keep one thread of two waiting.
void AttentionJob::choose_rows(int32_t most_rows) {
  const int64_t threads = device->threads();
  const auto step_of = [&](int32_t blocks) { return (most_rows + blocks - 1) / blocks; };
  // Queries of the thread that has the most.
  const auto load = [&] { return (tasks() + threads - 1) / threads * row_step * head_step; };
  int32_t blocks = (most_rows + kQueryRows - 1) / kQueryRows;
  row_step = step_of(blocks);
  choose_heads();
  int32_t best_step = row_step;
  int64_t best = load();
  while (tasks() < 4 * threads && step_of(blocks + 1) >= kFewRows) {
    row_step = step_of(++blocks);
    choose_heads();
    if (load() * 17 / 16 >= best) continue;  // smaller tasks cost more
    best_step = row_step;
    best = load();
  }
  if (row_step == best_step) return;
  row_step = best_step;
  choose_heads();
}

// As many heads to a task as leave every thread one, or with splits, which differ in length, two.
void AttentionJob::choose_heads() {
  const int64_t threads = device->threads();
  const int32_t heads = args->shape.heads;
  const auto equal = [&](int32_t most) {
    const int32_t blocks = (heads + most - 1) / most;
    return (heads + blocks - 1) / blocks;
  };
  head_step = equal(std::clamp(kMaxQueries / row_step, 1, heads));
  shared_head_step = equal(std::clamp(kMaxQueries / kFewRows, 1, heads));
  int32_t& step = by_splits ? shared_head_step : head_step;
  while (step > 1 && tasks() < (by_splits && step > kFewHeads ? 2 * threads : threads)) {
    step = (step + 1) / 2;
  }
}

void CpuDevice::mla_attention(const MlaAttentionArgs& args) {
  const auto expanded = [&](const SequenceRows& seq) { return expands(args.shape, seq); };
  MlaAttentionArgs rest = args;
  for (auto at = args.sequences.begin(); at != args.sequences.end();) {
    if (expanded(*at)) {
      expanded_attention(args, *at++);
      continue;
    }
    const auto end = std::find_if(at, args.sequences.end(), expanded);
    rest.sequences = {at, end};
    latent_attention(rest);
    at = end;
  }
}

void CpuDevice::latent_attention(const MlaAttentionArgs& args) {
  const MlaShape& s = args.shape;
  int32_t most_rows = 1;
  double ns = 0;
  for (const SequenceRows& seq : args.sequences) {
    most_rows = std::max(most_rows, seq.rows);
    ns += attention_work(s, seq, false) / 50;
  }
  AttentionJob job{this, &args, 1, 1};
  const size_t sharing = job.share_rows();
  job.choose_rows(most_rows);
  if (threads() > 1 && job.has_long_shared()) {
    const int32_t heads_otherwise = job.head_step;
    job.by_splits = true;
    job.choose_heads();
    // With as many heads to a task as otherwise, only many of them are worth the barriers.
    job.by_splits = job.shared_head_step > heads_otherwise ||
                    (job.shared_head_step == heads_otherwise && job.tasks() >= 4 * threads());
    if (!job.by_splits) job.choose_heads();
  }
  // Two barriers: worth it where they save reading enough weights again.
  const size_t weights =
      static_cast<size_t>(s.heads) * (bytes_of(args.w_uk[0]) + bytes_of(args.w_uv[0]));
  if (!job.by_splits && (sharing < 2 || (sharing - 1) * weights < kWorthSharing)) {
    job.shared_rows = job.most_shared = 0;
  }
  job.attend_tasks = job.tasks();
  const auto attend_tasks = static_cast<int>(job.attend_tasks);
  const int head_tasks = s.heads * ((job.shared_rows + kQueryRows - 1) / kQueryRows);
  const Pool::Phase phases[] = {{AttentionJob::absorb_task, &job, head_tasks},
                                {AttentionJob::attend_task, &job, attend_tasks},
                                {AttentionJob::project_task, &job, head_tasks}};
  if (job.shared_rows == 0) return run({&phases[1], 1}, ns);
  run(phases, ns);
}

}  // namespace dsv3::kernels
