package monitor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// maxRecord bounds a line of log.json: 16 KiB of which every byte is escaped.
const maxRecord = 256 << 10

// timestamp is docker's: RFC 3339 with nine digits always.
const timestamp = "2006-01-02T15:04:05.000000000Z07:00"

// lookAgain is how often a log that is followed is looked at.
const lookAgain = 50 * time.Millisecond

// Logs writes the log of the container in dir. With Follow it returns at the
// container's end or with ctx.Err().
func Logs(ctx context.Context, dir string, o LogOptions) error {
	if _, err := os.Stat(filepath.Join(dir, configFile)); err != nil {
		return err
	}
	p := &logPrinter{o: o, middle: map[string]bool{}}
	files, err := openLogs(dir, o.Tail)
	if err != nil {
		return err
	}
	var f *os.File
	for i, g := range files {
		if i > 0 {
			f.Close()
		}
		f = g
		if err := p.drain(ctx, g); err != nil {
			closeAll(files[i:])
			return err
		}
	}
	if !o.Follow {
		closeAll([]*os.File{f})
		return nil
	}
	defer func() { closeAll([]*os.File{f}) }()
	for !p.past {
		// Asked first: what was written before the end is read after it.
		s, err := State(dir)
		if err != nil {
			return err
		}
		over := s.State == Exited || s.State == Dead || s.State == Created && s.Monitor == 0
		if f != nil {
			if err := p.drain(ctx, f); err != nil {
				return err
			}
		}
		next, err := turned(dir, f)
		if err != nil {
			return err
		}
		if next != nil {
			if f != nil {
				// Nothing was written to it after it was renamed.
				err = p.drain(ctx, f)
				f.Close()
			}
			f, p.rest = next, nil
			if err != nil {
				return err
			}
			continue
		}
		if over {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lookAgain):
		}
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// turned opens the log that is in f's place now, if it is another one.
func turned(dir string, f *os.File) (*os.File, error) {
	g, err := os.Open(filepath.Join(dir, logFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil || f == nil {
		return g, err
	}
	a, err := f.Stat()
	if err != nil {
		g.Close()
		return nil, err
	}
	b, err := g.Stat()
	if err != nil || os.SameFile(a, b) {
		g.Close()
		return nil, err
	}
	return g, nil
}

// openLogs gives the files of a log, the oldest first, at where the last tail
// lines begin.
func openLogs(dir string, tail int) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	for _, name := range []string{logFile, oldLogFile} {
		f, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return files, err
		}
		files = append([]*os.File{f}, files...)
		if tail >= 0 {
			if tail, err = seekTail(f, tail); err != nil {
				return files, err
			}
			if tail == 0 {
				break
			}
		}
	}
	if len(files) == 2 {
		// It was renamed between the two: there is nothing before it then.
		if a, aerr := files[0].Stat(); aerr == nil {
			if b, berr := files[1].Stat(); berr == nil && os.SameFile(a, b) {
				files[0].Close()
				files = files[1:]
			}
		}
	}
	return files, nil
}

// seekTail goes to the nth line from the end and tells how many lines are missing.
func seekTail(f *os.File, n int) (missing int, err error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n == 0 {
		return 0, err
	}
	buf := make([]byte, 64<<10)
	for at := end; at > 0; {
		size := min(int64(len(buf)), at)
		at -= size
		if _, err := f.ReadAt(buf[:size], at); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		for i := size - 1; i >= 0; i-- {
			// The newline at the end ends the last line, it begins none.
			if buf[i] != '\n' || at+i == end-1 {
				continue
			}
			if n--; n == 0 {
				_, err := f.Seek(at+i+1, io.SeekStart)
				return 0, err
			}
		}
	}
	if end > 0 {
		n-- // the first line has no newline before it
	}
	_, err = f.Seek(0, io.SeekStart)
	return n, err
}

// logPrinter prints records.
type logPrinter struct {
	o      LogOptions
	rest   []byte          // of a record whose end is not there yet
	middle map[string]bool // by stream: the last record did not end its line
	past   bool            // Until is over
}

// drain prints what f has up to its end.
func (p *logPrinter) drain(ctx context.Context, f *os.File) error {
	r := bufio.NewReaderSize(f, 64<<10)
	for !p.past {
		if err := ctx.Err(); err != nil {
			return err
		}
		line, err := r.ReadSlice('\n')
		p.rest = append(p.rest, line...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull) && len(p.rest) <= maxRecord:
			continue
		case errors.Is(err, bufio.ErrBufferFull):
			p.rest = p.rest[:0] // no log of ours; what follows is no record either
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		err = p.print(p.rest)
		p.rest = p.rest[:0]
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *logPrinter) print(line []byte) error {
	var r record
	if len(bytes.TrimSpace(line)) == 0 || json.Unmarshal(line, &r) != nil {
		return nil // the machine went down in the middle of it
	}
	if !p.o.Since.IsZero() && r.Time.Before(p.o.Since) {
		return nil
	}
	if !p.o.Until.IsZero() && r.Time.After(p.o.Until) {
		p.past = true
		return nil
	}
	w := p.o.Stdout
	if r.Stream == "stderr" {
		w = p.o.Stderr
	}
	if w == nil {
		return nil
	}
	text := r.Log
	if p.o.Timestamps && !p.middle[r.Stream] {
		text = r.Time.Format(timestamp) + " " + text
	}
	p.middle[r.Stream] = len(r.Log) > 0 && r.Log[len(r.Log)-1] != '\n'
	_, err := io.WriteString(w, text)
	return err
}
