-- End a job early.
-- ARGV: reason (cancelled, expired, failed, budget), detail, error JSON (''),
-- force (1: fence running nodes), the name of its user ('' when nobody asked for it).
-- Returns {state, stop reason, number of nodes that still run or wait}.
local f = facts()
if not f then return {'unknown', '', 0} end
if TERMINAL[f.state] then return {f.state, f.stop, 0} end
local merge = f.state == 'merging' and read('merge')
-- A parked merge waits for a round, so the deadline ends it; a running one has the grace to finish.
local waited = ARGV[1] == 'expired' and overdue_in_queue(f)
if waited then judge(f) end
local too_early = f.deadline == 0 or now < f.deadline or (merge and merge.s ~= 'p' and ARGV[4] ~= '1')
if (ARGV[1] == 'expired' and too_early and not waited) or (MERGES[ARGV[1]] and f.state == 'merging') then return {f.state, f.stop, f.pending} end
if MERGES[f.stop] and f.stop ~= ARGV[1] then
  stop(f, ARGV[1], ARGV[2])
  if (ARGV[5] or '') ~= '' then call('HSET', job, 'stop_by', ARGV[5]) end
  if ARGV[3] ~= '' then call('HSET', job, 'error', ARGV[3]) end
end
skip_waiting(f, ARGV[4] == '1' or f.state == 'merging')
if f.pending <= 0 then finish_tree(f, '') end
return {f.state, f.stop, f.pending}
