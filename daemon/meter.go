package daemon

import "time"

// meter tells how far something is, once it takes long enough to be of interest.
type meter struct {
	note        note
	id          string
	done, total int64
	begun, told time.Time
}

const (
	patience = 500 * time.Millisecond // before the first word
	beat     = 100 * time.Millisecond // between two
)

// Write counts what passes through it.
func (m *meter) Write(p []byte) (int, error) {
	m.done += int64(len(p))
	now := time.Now()
	if m.begun.IsZero() {
		m.begun = now
	}
	if now.Sub(m.begun) > patience && now.Sub(m.told) > beat {
		m.told = now
		m.note.report(m.id, "Committing", m.done, m.total)
	}
	return len(p), nil
}

func (m *meter) end() {
	if !m.told.IsZero() {
		m.note.report(m.id, "Committed", 0, 0)
	}
}
