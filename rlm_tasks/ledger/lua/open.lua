-- Open a job, and move its staged items to the job's keys.
-- KEYS: also the staged items and blocks, and the index of due jobs.  The job enters the index here,
-- so no request that arrives late opens a job that no sweep finds.
-- ARGV: spec, n, queue, fail_limit, early_limit, timeout_ms (0: none), ttl_s, phase, root node id,
-- task id, schema, ms for which the first node is parked (0: none), why, records of ended nodes that
-- are kept, ms within which a worker must begin it (0: none), ms until the first sweep,
-- 1 when items are staged.
-- Returns 1, or 0 when the job was open already; the staged items are then deleted.  Returns -1 when
-- staged items are missing: Redis has lost its latest writes, or they have expired.
local function index_job()
  call('ZADD', KEYS[20], 'LT', now + tonumber(ARGV[16]), ARGV[10])
  call('PERSIST', KEYS[20])
end
if call('EXISTS', job) == 1 then
  call('UNLINK', KEYS[18], KEYS[19])
  if not TERMINAL[call('HGET', job, 'state')] then index_job() end
  return 0
end
if ARGV[17] == '1' then
  local last = call('ZRANGE', KEYS[18], -1, -1)[1]
  if not last or string.match(last, ':(%d+)$') ~= ARGV[2] then return -1 end
  for from, to in pairs({[KEYS[18]] = items, [KEYS[19]] = blocks}) do
    if call('EXISTS', from) == 1 then call('RENAME', from, to) end
  end
  keep(items, blocks)
end
local timeout = tonumber(ARGV[6])
call('HSET', job, 'spec', ARGV[1], 'n', ARGV[2], 'queue', ARGV[3], 'state', 'pending', 'phase', ARGV[8],
  'fail_limit', ARGV[4], 'early_limit', ARGV[5], 'deadline', timeout > 0 and now + timeout or 0,
  'ttl_s', ARGV[7], 'stop', '', 'opened_ms', now, 'done', 0, 'failed', 0, 'skipped', 0, 'pending', 1,
  'nodes', 0, 'splits', 0, 'yields', 0, 'depth', 0, 'busy_us', 0, 'peak_kb', 0, 'validated', 0, 'task', ARGV[10],
  'schema', ARGV[11], 'seen_ms', 0, 'claimed_ms', 0, 'probed_ms', 0, 'probes', 0,
  'parked', 0, 'node_records', ARGV[14],
  'start_by', tonumber(ARGV[15]) > 0 and now + ARGV[15] or 0)
local wait = tonumber(ARGV[12])
local root = whole(wait > 0 and 'p' or 'q', tonumber(ARGV[2]), ARGV[10], ARGV[13])
if wait > 0 then park_node(ARGV[9], root, now + wait) else queue_nodes({ARGV[9]}, {root}) end
note('opened')
keep(job, nodes, wait > 0 and due or waiting, events)
index_job()
return 1
