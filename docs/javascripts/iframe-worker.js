// Search in pages that are opened from the disk: browsers start no workers there, so a hidden frame runs the script of the worker.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget { // the search of the theme asks for this name
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inner = this.frame.contentWindow
      inner.postMessage = data => setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })))
      inner.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => load(inner.document, next)), Promise.resolve())
      load(inner.document, url).then(() => {
        this.loaded = true
        this.waiting.forEach(data => this.postMessage(data))
      })
    }

    postMessage(data) {
      if (this.loaded)
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else
        this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker

  function load(page, url) {
    return new Promise((resolve, reject) => {
      const script = page.createElement("script")
      script.src = url
      script.onload = resolve
      script.onerror = () => reject(new Error(`${url} cannot be loaded`))
      page.body.appendChild(script)
    })
  }
}
