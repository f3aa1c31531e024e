package fetch

import (
	"testing"
	"time"
)

// TestHoursFromMidnight has the day's end begin the hours, as its beginning does.
func TestHoursFromMidnight(t *testing.T) {
	h, err := ParseHours("24:00-06:00")
	if err != nil || h != (Hours{To: 6 * time.Hour}) {
		t.Errorf("%v, %v", h, err)
	}
	for _, s := range []string{"24:00-00:00", "24:00-24:00x", "00:00-00:00"} {
		if h, err := ParseHours(s); err == nil {
			t.Errorf("%q: %v, in which nothing would ever be fetched", s, h)
		}
	}
}
