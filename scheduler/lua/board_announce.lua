-- Publish the cluster's report, and store the monitor's state.
-- KEYS: cluster, history (STREAM), state, changes (channel).
-- ARGV: report, state, stale_ms, number of entries to keep, level.   Returns 1.
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3] * 100)
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'report', ARGV[1])
redis.call('PUBLISH', KEYS[4], ARGV[5])
return 1
