"""The contenders: programs that do the same work, each in its own process, and the protocol that they speak.

Each module here is a program, `python -m benchmarks.contenders.NAME`. It reads requests from its standard input, one
JSON object per line, and answers each with one JSON object per line on its standard output. Any program that does so
can be measured too, with `--contender NAME=COMMAND`. It gets the requests below; it answers what it can't do with
`{"unsupported": true}`, and what fails with `{"error": "why"}`. All times are in seconds, measured by the program
itself around the work alone: opening and closing count only where it says so. `dir` is the contender's own directory.

- `{"do": "append", "dir", "tasks", "count", "batch"}`: `dir` is empty. Appends sample events 0, 1, … durably: each of
  `tasks` tasks (threads, connections, …) appends `count` times `batch` events, and waits until these are on disk before
  it goes on. `{"seconds"}` - `{"do": "append_if", "dir", "tasks", "count"}`: the same, one event a time, but each only
  if nothing was appended since the task last looked; after a conflict the task looks again and tries again, until it
  has appended `count` events. `{"seconds"}` - `{"do": "append_together", "dir", "tasks", "start", "seconds", "shared",
  "conditional", "max_log_size"}`: several processes get this. Each opens the log and answers `{"ready": true}`. When
  the file `start` is there, which has a time in nanoseconds of CLOCK_MONOTONIC, each appends from that time on for
  `seconds`, one event after the other from each of `tasks` tasks; where `conditional`, only on top of the newest event,
  tried until it succeeds. `shared`: whether other processes may write too. A log may be rotated when it has
  `max_log_size` bytes (0: never). `{"events", "p99"}`: how many events were acknowledged in time; the 99th percentile
  of the time that one took. - `{"do": "write", "dir", "events", "distinct"}`: `dir` is empty. Leaves there the sample
  events 0 to `events` - 1, in any way; from the one numbered `distinct` on (null: never) they begin again from 0. `{}`
  - `{"do": "append_tagged", "dir", "tasks", "count", "start", "conditional", "index"}`: appends the tagged events from
  number `start` on, each with a tag of its own, durably and one at a time, from each of `tasks` tasks `count` of them;
  where `conditional`, each only if no event in the whole log has its tag. `index`: true or false where there is a
  choice, else null. `dir` is empty, or has what `write_tagged` left. `{"seconds"}` - `{"do": "write_tagged", "dir",
  "events", "tags"}`: `dir` is empty. Leaves there the tagged events 0 to `events` - 1, with only so many tags in turn.
  `{}` - `{"do": "index", "dir"}`: rebuilds the index of what `write_tagged` left. `{"seconds"}` - `{"do":
  "read_tagged", "dir", "tags", "index"}`: opens what `write_tagged` left, then reads the events of each of the numbers
  in `tags`. `{"open", "p50", "events"}`: the time until the first of them have been read, from the opening on; the
  median time of those that follow; how many events there are of each tag. - `{"do": "replay", "dir", "views",
  "types"}`: folds what `write` left into `views` states, each with the count of the events and the sum of
  `data.amount`; of the events of the given types only, where `types` isn't null. Opening counts. `{"seconds", "events",
  "amount"}`, the latter two of one state. - `{"do": "rebuild", …}`: the same, in another way, if there are two. -
  `{"do": "open", "dir", "snapshot"}`: opens what `write` left until one such state is there, with (true) the help of
  what an earlier opening kept for that, or without. `{"seconds"}` - `{"do": "refresh", "dir", "new", "bytes"}`: brings
  a state of about `bytes` bytes up to date after `new` events were appended, many times over. `{"seconds", "written"}`:
  of one refresh, and the bytes written by one on the average. - `{"do": "tail", "dir", "tails", "count"}`: appends
  `count` events, each when the one before has been delivered, while `tails` tasks wait for them; the time from the call
  of append to each delivery. `{"p50", "p99", "max", "append"}`; the last is the median time of the append itself. -
  `{"do": "listen", "dir", "tails", "count"}`: the same tails, of events that another process appends. Answers
  `{"ready": true}` when they wait, and when each has got `count` events `{"p50", "p99", "max"}`. An event's `data.at`
  is the nanoseconds of CLOCK_MONOTONIC at which its append was called. - `{"do": "send", "dir", "count", "interval"}`:
  that other process. `{"append"}` - `{"do": "rotate", "dir", "tasks"}`: moves what `write` left into the archive, while
  `tasks` tasks append one event after the other. `{"seconds", "bytes", "usual", "during"}`: the latter two are `{"p50",
  "p99", "max"}` of the time of an append before the rotation, and while it goes on. - `{"do": "peak", "dir", "what"}`:
  in a new process. `what` is "replay" or "rotate". `{"bytes"}`: by how much the process's resident memory grew at most.
  - `{"do": "grow", "dir", "what", "times"}`: does one of the works that `benchmarks.growth` names with what
  `write_tagged` left, or an earlier such request; where it does not go through the whole log, about so many times.
  `{"seconds", "bytes"}`: the median of one; where it goes through the whole log, by how much the process's resident
  memory grew at most. - `{"do": "hold", "dir", "what", "seconds"}`: does `what` for about that long, while a timer on
  the event loop asks to be called every millisecond. `{"p999", "max", "late", "callback"}`: how much too late it was
  called, each time at most the processor time that the program took since; the 99.9th percentile of all of the
  lateness; the longest time that the loop's thread spent computing in one callback.

Sample event number n has, as JSON with these keys in this order, `type` (order_placed, order_paid, order_sent,
order_closed in turn), `data` with `order` (n // 4), `customer` ("customer-" and n % 977, four digits), `amount`
(n % 9973) and `note` ("please leave it at the back door"), `ts` (1700000000 + n // 10), `id` ("event-" and n, twelve
digits) and `actor` ("user-" and n % 100, two digits). A tagged event has `tags` too, with one tag: "entity:" and n, or
n % `tags`.
"""
