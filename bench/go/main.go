// Sends the same request again and again, checks every answer, and reports counts and latencies.
//
// It reads one job a line (JSON) from standard input and answers each with one line. Connections are kept from job to
// job, because a TLS handshake costs as much as some 30 requests and is not what a block measures. An answer counts
// only when its status is 200 and its body is, byte for byte, the one expected.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"
)

// A peer that says nothing for this long counts as an error: no job hangs.
const answerDeadline = 5 * time.Second

// More bytes than any answer here has; what is longer differs anyway.
const maxAnswerBytes = 1 << 20

type job struct {
	Address     string  `json:"address"`
	TLS         *keys   `json:"tls"`
	Request     string  `json:"request"`     // file with head and body, sent as it is
	Answer      string  `json:"answer"`      // file with the body that must come back
	Connections int     `json:"connections"` // requests under way at a time
	Seconds     float64 `json:"seconds"`     // 0: send one request and report what came back
}

type keys struct {
	Anchors     string `json:"anchors"`     // file, PEM: who may have signed the server's certificate
	Certificate string `json:"certificate"` // file, PEM; empty: show none
	Key         string `json:"key"`
}

type report struct {
	Requests   int     `json:"requests"`
	Errors     int     `json:"errors"`
	FirstError string  `json:"first_error"`
	Seconds    float64 `json:"seconds"`
	P50        float64 `json:"p50_us"`
	P99        float64 `json:"p99_us"`
	Status     int     `json:"status"`
	Body       string  `json:"body"`
}

// One kept connection.
type line struct {
	conn   net.Conn
	reader *bufio.Reader
}

// Idle connections by address, certificate included; used by one job at a time.
var idle = map[string][]*line{}

func main() {
	jobs, answers := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var next job
		if err := jobs.Decode(&next); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			fmt.Fprintln(os.Stderr, "loader: error:", err)
			os.Exit(2)
		}
		done, err := run(next)
		if err != nil {
			done.Errors++
			done.FirstError = err.Error()
		}
		if err := answers.Encode(done); err != nil {
			return
		}
	}
}

func run(next job) (report, error) {
	request, err := os.ReadFile(next.Request)
	if err != nil {
		return report{}, err
	}
	if next.Seconds == 0 {
		return once(next, request)
	}
	expected, err := os.ReadFile(next.Answer)
	if err != nil {
		return report{}, err
	}
	lines := make([]*line, next.Connections)
	for i := range lines {
		if lines[i], err = take(next); err != nil {
			return report{}, err
		}
	}
	return block(next, lines, request, expected), nil
}

// once returns whatever is answered to one request on a connection of its own.
func once(next job, request []byte) (report, error) {
	opened, err := open(next)
	if err != nil {
		return report{}, err
	}
	defer opened.conn.Close()
	var body bytes.Buffer
	status, err := opened.exchange(request, &body)
	return report{Requests: 1, Status: status, Body: body.String()}, err
}

// block loads every line for the job's time. A line that failed is not used again.
func block(next job, lines []*line, request, expected []byte) report {
	var (
		group sync.WaitGroup
		mutex sync.Mutex
		total report
		all   []time.Duration
	)
	started := time.Now()
	end := started.Add(time.Duration(next.Seconds * float64(time.Second)))
	for _, each := range lines {
		group.Go(func() {
			latencies, err := each.repeat(request, expected, end)
			mutex.Lock()
			defer mutex.Unlock()
			all = append(all, latencies...)
			if err == nil {
				idle[key(next)] = append(idle[key(next)], each)
				return
			}
			each.conn.Close()
			total.Errors++
			total.FirstError = err.Error()
		})
	}
	group.Wait()
	total.Seconds = time.Since(started).Seconds()
	total.Requests = len(all)
	if len(all) > 0 {
		slices.Sort(all)
		total.P50 = float64(all[len(all)/2].Nanoseconds()) / 1e3
		total.P99 = float64(all[len(all)*99/100].Nanoseconds()) / 1e3
	}
	return total
}

func (l *line) repeat(request, expected []byte, end time.Time) ([]time.Duration, error) {
	latencies := make([]time.Duration, 0, 1<<14)
	var body bytes.Buffer
	for now := time.Now(); now.Before(end); {
		body.Reset()
		status, err := l.exchange(request, &body)
		if err != nil {
			return latencies, err
		}
		if status != http.StatusOK || !bytes.Equal(body.Bytes(), expected) {
			return latencies, fmt.Errorf("status %d, body %.200q", status, body.Bytes())
		}
		then := time.Now()
		latencies = append(latencies, then.Sub(now))
		now = then
	}
	return latencies, nil
}

func (l *line) exchange(request []byte, body *bytes.Buffer) (int, error) {
	if err := l.conn.SetDeadline(time.Now().Add(answerDeadline)); err != nil {
		return 0, err
	}
	if _, err := l.conn.Write(request); err != nil {
		return 0, err
	}
	response, err := http.ReadResponse(l.reader, nil)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = body.ReadFrom(io.LimitReader(response.Body, maxAnswerBytes))
	return response.StatusCode, err
}

func take(next job) (*line, error) {
	kept := idle[key(next)]
	if len(kept) == 0 {
		return open(next)
	}
	idle[key(next)] = kept[:len(kept)-1]
	return kept[len(kept)-1], nil
}

func key(next job) string {
	if next.TLS == nil {
		return next.Address
	}
	return next.Address + " " + next.TLS.Certificate
}

func open(next job) (*line, error) {
	conn, err := net.DialTimeout("tcp", next.Address, answerDeadline)
	if err != nil {
		return nil, err
	}
	if next.TLS != nil {
		if conn, err = secure(conn, *next.TLS); err != nil {
			return nil, err
		}
	}
	return &line{conn: conn, reader: bufio.NewReaderSize(conn, 64<<10)}, nil
}

func secure(conn net.Conn, material keys) (net.Conn, error) {
	anchors, err := os.ReadFile(material.Anchors)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(anchors)
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"http/1.1"},
		InsecureSkipVerify: true, // an SVID has no DNS name to check; its chain is checked here:
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots})
			return err
		},
	}
	if material.Certificate != "" {
		own, err := tls.LoadX509KeyPair(material.Certificate, material.Key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{own}
	}
	if err := conn.SetDeadline(time.Now().Add(answerDeadline)); err != nil {
		return nil, err
	}
	secured := tls.Client(conn, config)
	return secured, secured.Handshake()
}
