-- KEYS: cluster, forced.
-- Returns {the cluster's report or '', the level of a drill or '', its remaining time in ms}.
local cluster, forced = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
return {cluster or '', forced or '', redis.call('PTTL', KEYS[2])}
