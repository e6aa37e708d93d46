-- Open a job whose items are stored.  ARGV: spec, n, queue, fail_limit, early_limit, timeout_ms (0: none),
-- ttl_s, phase, root node id, task id, grace_ms.   Returns 1, or 0 when the job was open already.
if call('EXISTS', job) == 1 then return 0 end
local timeout = tonumber(ARGV[6])
call('HSET', job, 'spec', ARGV[1], 'n', ARGV[2], 'queue', ARGV[3], 'state', 'pending', 'phase', ARGV[8],
  'fail_limit', ARGV[4], 'early_limit', ARGV[5], 'deadline', timeout > 0 and now + timeout or 0,
  'ttl_s', ARGV[7], 'stop', '', 'opened_ms', now, 'done', 0, 'failed', 0, 'skipped', 0, 'pending', 0,
  'nodes', 0, 'splits', 0, 'yields', 0, 'depth', 0, 'busy_us', 0, 'peak_kb', 0, 'validated', 0, 'task', ARGV[10])
queue_node(ARGV[9], {lo = 0, hi = tonumber(ARGV[2]), d = 0, p = '', sp = '', ix = 0, t = ARGV[10],
  why = '', rs = 0}, tonumber(ARGV[11]))
note('opened')
keep_all(tonumber(ARGV[7]))
return 1
