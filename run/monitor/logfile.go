package monitor

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// maxLine is how much of a line is one record, as docker has it.
const maxLine = 16 << 10

// record is a line of the log: docker's json-file form. A line that was cut has no
// newline at its end.
type record struct {
	Log    string    `json:"log"`
	Stream string    `json:"stream"`
	Time   time.Time `json:"time"`
}

// logWriter writes log.json. It never fails its caller: what has no place is
// counted.
type logWriter struct {
	dir string
	max int64

	mu    sync.Mutex // guards what follows
	file  *os.File   // nil when it could not be opened
	size  int64
	lines map[string]*bytes.Buffer // by stream: what waits for the end of its line
	out   bytes.Buffer
	lost  int64
}

func newLogWriter(dir string, max int64) *logWriter {
	return &logWriter{dir: dir, max: max, lines: map[string]*bytes.Buffer{}}
}

// write takes what a stream gave.
func (l *logWriter) write(stream string, p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC()
	rest := l.lines[stream]
	if rest == nil {
		rest = new(bytes.Buffer)
		l.lines[stream] = rest
	}
	raw := int64(0)
	for len(p) > 0 {
		n := bytes.IndexByte(p, '\n') + 1
		whole := n > 0
		if !whole {
			n = len(p)
		}
		if room := maxLine - rest.Len(); n > room {
			n, whole = room, true
		}
		rest.Write(p[:n])
		p = p[n:]
		if whole {
			raw += int64(rest.Len())
			l.encode(stream, rest, now)
		}
	}
	l.flush(raw)
}

// finish writes the lines that have no end.
func (l *logWriter) finish() (lost int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for stream, rest := range l.lines {
		if n := int64(rest.Len()); n > 0 {
			l.encode(stream, rest, time.Now().UTC())
			l.flush(n)
		}
	}
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
	return l.lost
}

// encode adds a record to what is to be written. Much output is mostly this, so
// encoding/json is too slow for it.
func (l *logWriter) encode(stream string, line *bytes.Buffer, now time.Time) {
	b := append(l.out.AvailableBuffer(), `{"log":`...)
	// Its error is of bytes that are no UTF-8, which it replaces.
	b, _ = jsontext.AppendQuote(b, line.Bytes())
	b = append(append(append(b, `,"stream":"`...), stream...), `","time":"`...)
	b = append(now.AppendFormat(b, time.RFC3339Nano), "\"}\n"...)
	l.out.Write(b)
	line.Reset()
}

// flush writes the encoded records, which stand for raw bytes of output.
func (l *logWriter) flush(raw int64) {
	defer l.out.Reset()
	if l.out.Len() == 0 {
		return
	}
	if l.file != nil && l.size > 0 && l.size+int64(l.out.Len()) > l.max {
		l.file.Close()
		l.file = nil
		if err := os.Rename(filepath.Join(l.dir, logFile), filepath.Join(l.dir, oldLogFile)); err != nil {
			l.lost += raw
			return
		}
	}
	if l.file == nil && !l.open() {
		l.lost += raw
		return
	}
	n, err := l.file.Write(l.out.Bytes())
	if err == nil {
		l.size += int64(n)
		return
	}
	l.lost += raw
	// Half a record would spoil the next one.
	if l.file.Truncate(l.size) != nil {
		l.file.Close()
		l.file = nil
	}
}

func (l *logWriter) open() bool {
	f, err := os.OpenFile(filepath.Join(l.dir, logFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return false
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return false
	}
	l.file, l.size = f, st.Size()
	return true
}

func (l *logWriter) lostBytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost
}
