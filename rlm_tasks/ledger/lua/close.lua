-- End a job from its root merge.
-- ARGV: token, state, answer ('' when there is none), error JSON ('').
-- Returns {final state, ms since the job was opened, ids of its splits ...}.
-- They are '' and 0 when the caller no longer holds the merge.  More than MOST_SPLITS are left out.
local MOST_SPLITS = 2000
local f, merge = facts(), held('merge', ARGV[1])
if not f or not merge then return {'', 0} end
local chords = call('HLEN', splits) <= MOST_SPLITS and call('HKEYS', splits) or {}
merge.s, merge.ms = 'd', now - merge.at
write('merge', merge)
retire('merge')
call('HSET', job, 'pending', 0)
if ARGV[4] ~= '' then call('HSET', job, 'error', ARGV[4]) end
if ARGV[3] ~= '' then
  -- The covered ranges are kept only for an answer that does not cover all items.
  if tonumber(call('HGET', job, 'skipped')) == 0 then call('UNLINK', pieces) end
  call('UNLINK', blobs)
  call('HSET', blobs, 'output', ARGV[3])
end
close(f, ARGV[2])
return {f.state, now - tonumber(call('HGET', job, 'opened_ms')), unpack(chords)}
