-- Change those in certain states.
-- ARGV: the old states with commas around, how many words set, those, how many
-- fields unset, those, then ids. Returns how many were changed.

local set, unset = {}, {}
local place = 2
for i = 1, ARGV[place] do set[i] = ARGV[place + i] end
place = place + 1 + #set
for i = 1, ARGV[place] do unset[i] = ARGV[place + i] end
place = place + 1 + #unset

local changed = 0
while place <= #ARGV do
  local facts = facts_of(ARGV[place])
  if facts and not is_ghost(facts)
      and string.find(ARGV[1], ',' .. facts.state .. ',', 1, true) then
    change(ARGV[place], facts, set, unset)
    changed = changed + 1
  end
  place = place + 1
end
return changed
