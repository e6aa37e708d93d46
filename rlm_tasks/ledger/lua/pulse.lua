-- Report the progress of a running node.
-- ARGV: node, token, done, failed, skipped.
-- Returns go, stop, flush or fenced.
-- stop: the job ends, and the rest is skipped.
-- flush: finish now, because the counts of running nodes may decide the job.
-- fenced: the token holds the node no longer.
local id = ARGV[1]
local f = facts()
if not f or not held(id, ARGV[2]) then return 'fenced' end
call('HSET', inflight, id, ARGV[3] .. ':' .. ARGV[4] .. ':' .. ARGV[5])
keep(inflight)
judge(f)
if f.stop ~= '' then return 'stop' end
if f.fail_limit >= 0 or f.early_limit > 0 then
  for _, text in ipairs(call('HVALS', inflight)) do
    local done, bad = string.match(text, '^(%d+):(%d+)')
    f.done, f.failed = f.done + tonumber(done), f.failed + tonumber(bad)
  end
  if f.fail_limit >= 0 and f.failed > f.fail_limit then return 'flush' end
  if f.early_limit > 0 and f.phase == 'process' and f.done >= f.early_limit then return 'flush' end
end
return 'go'
